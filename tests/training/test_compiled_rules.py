"""`training.compile objective`: a rule as one graph, the same numbers, no graph after the first kinds of step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from looped.config import dump_config
from looped.errors import UserError
from looped.training.compiled import COMPILE
from looped.training.compiled import one_graph as one_graph_or_error
from looped.training.train import open_trainer, train

pytestmark = pytest.mark.usefixtures("unchecked")

RULES = {
    "ar": {"objective": "ar"}, "full": {"objective": "full", "recurrence.mean": 2},
    "truncated, a fixed depth": {"objective": "truncated", "recurrence.distribution": "fixed", "recurrence.mean": 3},
    "one-step": {"objective": "one-step"},
    "denoise inject": {"objective": "denoise", "denoise.context": "inject"},
    "denoise concat": {"objective": "denoise", "denoise.context": "concat"},
    "denoise context": {"objective": "denoise", "denoise.context": "context"},
    "denoise, two kinds of step": {"objective": "denoise", "denoise.carry": "latent"},
    "denoise, two steps": {"objective": "denoise", "denoise.train_steps": 2, "denoise.carry": "latent"},
    "masked": {"objective": "masked", "model.state_init": "zero"},
    "masked blocks": {"objective": "masked", "model.state_init": "zero", "blocks.num": 2, "model.num_core_layers": 2},
    "blockwise": {"objective": "blockwise", "blocks.num": 2, "model.num_core_layers": 2},
}
BF16 = {"ar, bf16": {"objective": "ar", "training.precision": "bf16"}}
FAST = {"denoise context": RULES["denoise context"], "ar, Muon": {"objective": "ar", "optim.name": "muon"}}


@pytest.fixture
def one_graph(tiny, tmp_path):
    """`one_graph(rules)`: for each its graphs after every step, its breaks, and the difference of the weights."""
    def run(rules):
        configs = {name: yaml.safe_load(dump_config(tiny(**changes, **{"training.budget": 10})))
                   for name, changes in rules.items()}
        (tmp_path / "configs.json").write_text(json.dumps(configs))
        command = [sys.executable, Path(__file__).parent / "one_graph.py", tmp_path / "configs.json", tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def check(found, difference=1e-4):
    assert not found["breaks"]
    assert 1 <= found["graphs"][-1] <= 2  # one for each kind of step
    assert found["graphs"][6:] == found["graphs"][-1:] * 4  # none after the first of each kind
    assert found["difference"] < difference


def test_a_rule_is_one_graph_that_trains_to_the_same_weights_and_so_is_the_update_of_muon(one_graph):
    """The learning rate grows from step to step (`optim.warmup_steps`) and is no constant of the graph."""
    found = one_graph(FAST)
    check(found["denoise context"])
    check(found["ar, Muon"], 5e-3)  # Muon orthogonalises in bf16; at the rate of its first step they are 0.03 apart
    assert found["ar, Muon"]["graphs"][-1] == 2  # of the rule and of the update


@pytest.mark.parametrize(("changes", "device", "processes", "reason"), [
    ({}, "cpu", 1, "needs a CUDA device, not cpu"),
    ({"training.accumulation": 2}, "cuda", 1, "cannot add the gradients of several micro-batches"),
    ({}, "cuda", 2, "or processes")])
def test_cuda_graphs_are_refused_where_they_cannot_be(tiny, changes, device, processes, reason):
    config = tiny(objective="ar", **changes, **{"training.compile": "cuda-graphs"})
    with pytest.raises(UserError, match=f"{reason}.*; set training.compile to objective"):
        COMPILE["cuda-graphs"].check(config, torch.device(device), processes)
    COMPILE["cuda-graphs"].check(tiny(objective="ar"), torch.device("cuda"), 1)


def test_a_run_with_cuda_graphs_on_a_cpu_ends_before_its_first_step(tiny, tmp_path):
    with pytest.raises(UserError, match=r"training\.compile cuda-graphs needs a CUDA device"):
        train(tiny(objective="ar", **{"training.compile": "cuda-graphs"}), tmp_path / "run", quiet=True)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["objective", "cuda-graphs"])
def test_graphs_on_a_device_train_to_the_same_losses(tiny, tmp_path, how):
    losses = {}
    for compile in (False, how):
        config = tiny(objective="ar", **{"training.compile": compile, "training.precision": "fp32",
                                         "training.tf32": False, "optim.name": "muon"})
        with open_trainer(config, tmp_path / str(compile), quiet=True) as trainer:
            losses[compile] = []
            while not trainer.finished:
                trainer.step()
                losses[compile].append(trainer.figures["loss"])
    assert losses[how] == pytest.approx(losses[False], rel=2e-3)


@pytest.mark.slow
def test_so_is_every_rule_whose_steps_are_alike_and_under_autocast(one_graph):
    found = one_graph({name: changes for name, changes in (RULES | BF16).items() if name not in FAST})
    for name, each in found.items():
        check(each, 2e-3 if name in BF16 else 1e-4)


@pytest.mark.parametrize(("changes", "why"), [
    ({"objective": "truncated"}, "the depth is drawn at every step"),
    ({"objective": "progressive"}, "the depths are drawn at every step"),
    ({"objective": "fixed-point"}, "the solver stops by the residual"),
    ({"objective": "denoise", "denoise.noise.distribution": "adaptive"}, "noise levels is learned from the losses")])
def test_a_rule_whose_steps_differ_is_refused_with_the_way_out(tiny, tmp_path, changes, why):
    with pytest.raises(UserError, match=f"{why}; set training.compile to step"):
        train(tiny(**changes, **{"training.compile": "objective"}), tmp_path / "run", quiet=True)


def test_a_rule_that_is_no_graph_is_one_sentence():
    why = r"objective mine.Rule cannot be compiled as one graph \(.*; set training.compile to step"
    with pytest.raises(UserError, match=why), one_graph_or_error("mine.Rule"):
        torch.compile(lambda x: x.tolist(), fullgraph=True, backend="eager")(torch.ones(2))
