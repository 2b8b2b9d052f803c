"""Several processes: two make the weights of one, and end well; every parameter has the gradient they wait for."""

import os
import subprocess
import sys

import pytest
import torch

from looped.config import dump_config
from looped.models.build import build
from looped.objectives import build_objective
from looped.rng import StepRandom
from looped.training.logs import read_metrics
from looped.training.runs import load_run
from looped.training.train import train

TWO_BLOCKS = {"blocks.num": 2, "model.num_core_layers": 2, "optim.ema_decay": 0.9, "evaluation.levels": 4}

SCRIPT = """
import atexit, os, pathlib, sys, time
def threads_of_the_group():
    found = 0
    for name in pathlib.Path("/proc/self/task").glob("*/comm"):
        try:
            found += "gloo" in name.read_text()
        except OSError:  # it has ended meanwhile
            pass
    return found
def tell():  # registered first, and so the last to be called
    deadline = time.monotonic() + 5
    while threads_of_the_group() and time.monotonic() < deadline:  # the kernel takes a moment to forget one
        time.sleep(0.01)
    os.write(1, b"threads of the group at the end: %d\\n" % threads_of_the_group())  # a print may be cut by the other's
atexit.register(tell)
from looped.config import load_config
from looped.training.train import train
folder = pathlib.Path(sys.argv[1])
raise SystemExit(max(train(load_config(folder / f"{rule}.yaml"), folder / f"{rule}-two").exit_code
                     for rule in sys.argv[2:]))
"""

RULES = {"denoise": {"denoise.noise.distribution": "adaptive"}, "blockwise": {"objective": "blockwise"} | TWO_BLOCKS,
         "masked": {"objective": "masked", "masked.cond_width": 8} | TWO_BLOCKS}


@pytest.fixture(scope="module")
def trained_by_two(tiny, tmp_path_factory):
    """`trained_by_two(*rules)`: (their configs, the folder of their runs) by two processes, one rule after another."""
    def go(*rules, processes=2):
        folder = tmp_path_factory.mktemp("two")
        configs = {rule: tiny(**RULES[rule] | {"training.batch_size": 8, "training.accumulation": 2}) for rule in rules}
        for rule, config in configs.items():
            (folder / f"{rule}.yaml").write_text(dump_config(config))
        (folder / "script.py").write_text(SCRIPT)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                   folder / "script.py", folder, *rules]
        settings = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | settings)
        assert done.returncode == 0, done.stderr[:6000]  # where a process says why, before the launcher's own account
        assert done.stdout.count(f", {processes} processes") == len(rules)
        assert done.stdout.count("threads of the group at the end: 0") == processes  # those left may abort the process
        return configs, folder

    return go


@pytest.fixture(scope="module")
def denoise_and_blockwise(trained_by_two):
    return trained_by_two("denoise", "blockwise")


def check_matches_one(config, run, one, atol=1e-6):
    """The run is that of one process with the whole batch."""
    result, two = train(config, one), load_run(run, ema=False)
    for (name, a), b in zip(result.objective.state_dict().items(), two.objective.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol, msg=lambda said, name=name: f"{name}: {said}")
    for a, b in zip(read_metrics(one), read_metrics(run), strict=True):
        assert a.keys() == b.keys()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.parametrize("rule", ["denoise", "blockwise"])
def test_two_processes_match_one_with_the_whole_batch(denoise_and_blockwise, rule, tmp_path):
    configs, folder = denoise_and_blockwise
    check_matches_one(configs[rule], folder / f"{rule}-two", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_match_one_of_masked_diffusion_too(trained_by_two, tmp_path):
    configs, folder = trained_by_two("masked")
    check_matches_one(configs["masked"], folder / "masked-two", tmp_path / "one")


@pytest.mark.slow
def test_three_processes_of_unequal_parts_match_one(trained_by_two, tmp_path):
    """As after the loss of a node: a batch of 8 in two micro-batches each is one of 8 single rows, of 3, 3 and 2."""
    configs, folder = trained_by_two("denoise", "blockwise", processes=3)
    for rule in configs:
        check_matches_one(configs[rule], folder / f"{rule}-two", tmp_path / rule, atol=1e-5)


@pytest.mark.parametrize("changes", [
    {"objective": "truncated"}, {"objective": "truncated", "recurrence.per_sequence": False}, {"objective": "full"},
    {"objective": "full", "model.exit_gate": True}, {"objective": "ar", "model.exit_gate": True},
    {"objective": "full", "model.exit_gate": True, "recurrence.loss_on": "gate"},
    {"objective": "ar"}, {"objective": "masked"}, {"objective": "masked", "masked.cond_width": None},
    {"denoise.context": "concat"}, {"denoise.context": "context"},
    {"denoise.target.tied": True, "denoise.target.dim": 16}, {"denoise.target.learned_logit_scale": False}])
def test_every_trained_parameter_gets_a_gradient_in_every_step(tiny, changes):
    """What DDP relies on: it waits for the gradient of each parameter."""
    config = tiny(**changes)
    objective = build_objective(config, build(config, 270))
    for step in range(3):
        tokens = torch.randint(270, (4, 9), generator=torch.Generator().manual_seed(step))
        objective(tokens, StepRandom(0, step, count=4)).value.backward()
        assert not [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
        objective.zero_grad()
