"""Devices by name: the best one there is, one that is not there in a sentence, and what was used in every report."""


import pytest
import torch

from looped.cli import main
from looped.devices import Placement, find_device, now, use_threads
from looped.errors import UserError


@pytest.fixture
def machine(monkeypatch):
    """`machine(cuda=2, mps=True)`: what torch says that it sees."""
    def make(cuda=0, mps=False):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return make


@pytest.mark.parametrize(("there", "best"), [({}, "cpu"), ({"mps": True}, "mps"), ({"cuda": 2, "mps": True}, "cuda:0")])
def test_auto_is_the_best_device_there_is(machine, there, best):
    machine(**there)
    assert find_device("auto") == torch.device(best)


def test_a_device_is_found_by_its_name(machine):
    machine(cuda=2)
    assert [str(find_device(name)) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda:0", "cuda:1"]


@pytest.mark.parametrize(("name", "why"), [
    ("cuda", "--device cuda is not on this machine, which has cpu"), ("cuda:1", "is not on this machine"),
    ("mps", "is not on this machine"), ("gpu", "--device gpu is unknown; write auto, cpu, cuda, cuda:1 or mps"),
    ("cdua", "is unknown; write auto"), ("cuda:x", "is unknown")])
def test_a_device_that_is_not_there_is_named(machine, name, why):
    machine()
    with pytest.raises(UserError, match=why):
        find_device(name)


def test_a_number_format_that_is_unknown_is_named():
    with pytest.raises(UserError, match="--dtype fp64 is unknown; write fp32, bf16, fp16"):
        Placement.of("cpu", "fp64")


def test_work_is_done_in_a_number_format_and_leaves_the_process_as_it_was():
    a, before = torch.randn(4, 4), torch.get_num_threads()
    with Placement.of("cpu", "bf16").at_work(threads=before + 1):
        assert (a @ a).dtype == torch.bfloat16
        assert torch.get_num_threads() == before + 1
    assert (a @ a).dtype == torch.float32
    assert torch.get_num_threads() == before
    with use_threads(None):
        assert torch.get_num_threads() == before


def test_a_clock_waits_for_what_the_device_still_does(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    assert now(torch.device("cpu")) > 0
    assert not waited
    now(torch.device("cuda:1"))
    assert waited == [torch.device("cuda:1")]


@pytest.mark.parametrize("verb", [["eval", "RUN"], ["generate", "RUN"], ["compare", "CONFIG", "--budget", "tokens"],
                                  ["bench", "step", "CONFIG"]])
def test_every_verb_refuses_a_device_that_is_not_there(verb, tmp_path, capsys, machine):
    machine()
    (tmp_path / "c.yaml").write_text("training: {budget_unit: tokens}\n")
    names = {"RUN": str(tmp_path / "run"), "CONFIG": str(tmp_path / "c.yaml")}
    assert main([names.get(word, word) for word in verb] + ["--device", "cuda:3"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("looped: --device cuda:3 is not ")
    assert said.err.count("\n") == 1
    assert not said.out
