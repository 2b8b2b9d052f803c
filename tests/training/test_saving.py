"""Checkpoints written in the background: of the tensors as they were, in order, and with their errors raised."""

import threading

import pytest
import torch
from safetensors.torch import load_file
from same_runs import assert_same

from looped.errors import UserError
from looped.training import checkpoint as ckpt
from looped.training import saving
from looped.training.callbacks import Callback
from looped.training.processes import Processes
from looped.training.saving import Saver
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")


class Steps(Callback):
    num = 0

    def on_step(self, trainer):
        self.num += 1


class Alone:
    is_main_process = True


@pytest.fixture
def saver(tmp_path):
    made = Saver(tmp_path, 2, Processes(Alone(), None), background=True)
    yield made
    made.close()


@pytest.fixture
def gate(monkeypatch):
    """Writing does not begin before the gate is set."""
    opened, plain = threading.Event(), saving.save_checkpoint

    def late(*args, **kwargs):
        assert opened.wait(30)
        return plain(*args, **kwargs)

    monkeypatch.setattr(saving, "save_checkpoint", late)
    yield opened
    opened.set()


def test_what_is_written_is_what_was_there_when_it_was_saved(saver, gate, tmp_path):
    weight = torch.ones(3)
    saver.save({"model": {"weight": weight}}, {"step": 1})
    weight += 1  # training goes on
    gate.set()
    saver.wait()
    assert load_file(ckpt.checkpoint_path(tmp_path, 1) / "model.safetensors")["weight"].tolist() == [1, 1, 1]


def test_without_a_copy_training_waits(tmp_path):
    at_once = Saver(tmp_path, 2, Processes(Alone(), None), background=False)
    weight = torch.ones(3)
    at_once.reserve(lambda: {"model": {"weight": weight}})
    assert at_once.copy.stage({"model": {"weight": weight}})["model"]["weight"] is weight
    at_once.save({"model": {"weight": weight}}, {"step": 1})
    assert ckpt.check(ckpt.checkpoint_path(tmp_path, 1))["step"] == 1  # written before the next line


def test_the_copy_takes_its_memory_once(saver):
    weight = torch.ones(1000)
    saver.reserve(lambda: {"model": {"weight": weight}})
    saver.wait()
    reserved = saver.copy.buffers["model", "weight"].data_ptr()
    weight += 1
    for step in (1, 2):
        saver.save({"model": {"weight": weight}}, {"step": step})
        assert saver.copy.buffers["model", "weight"].data_ptr() == reserved
    saver.wait()
    assert load_file(ckpt.checkpoint_path(saver.run_dir, 2) / "model.safetensors")["weight"][0] == 2


def test_the_next_checkpoint_waits_for_the_one_before(saver, gate, tmp_path):
    weight = torch.ones(3)
    saver.save({"model": {"weight": weight}}, {"step": 1})
    weight += 1
    second = threading.Thread(target=saver.save, args=({"model": {"weight": weight}}, {"step": 2}))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # the copy may not be overwritten
    gate.set()
    second.join()
    saver.wait()
    for step in (1, 2):
        assert load_file(ckpt.checkpoint_path(tmp_path, step) / "model.safetensors")["weight"][0] == step


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_that_cannot_be_written_ends_training_soon(tiny, tmp_path, monkeypatch, background):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    config = tiny(**{"training.budget": 400, "training.checkpoint_every": 2, "training.background_saves": background})
    steps = Steps()
    monkeypatch.setattr(ckpt, "save_file", full)
    with pytest.raises(UserError, match=r"cannot write checkpoint .*No space left.*from the start"):
        train(config, tmp_path / "run", callbacks=[steps], quiet=True)
    assert steps.num < 100
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_run_saved_in_the_background_is_the_one_that_waits(tiny, tmp_path):
    config = tiny(**{"optim.ema_decay": 0.9, "training.checkpoint_every": 1, "training.keep_checkpoints": 9})
    for background in (True, False):
        run = tmp_path / str(background)
        train(config.replace(**{"training.background_saves": background}), run, quiet=True)
    assert_same(tmp_path / "True", tmp_path / "False")
    for ours, theirs in zip(*(ckpt.list_checkpoints(tmp_path / name) for name in ("True", "False")), strict=True):
        for file in ours.glob("*.safetensors"):
            assert file.read_bytes() == (theirs / file.name).read_bytes()


def test_the_last_checkpoint_is_there_when_training_ends(tiny, tmp_path, gate):
    threading.Timer(0.5, gate.set).start()
    result = train(tiny(**{"training.budget": 2}), tmp_path / "run", quiet=True)
    assert ckpt.list_checkpoints(result.run_dir)[0].name == "step-00000002"
