"""`looped plan` beside real runs, of one process and of two: its bytes and FLOPs are theirs within 5 %."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from measured_runs import measure

from looped.config import dump_config
from looped.cost.plan import plan
from looped.data.from_config import vocab_size_of

pytestmark = pytest.mark.usefixtures("unchecked")

WIDE = {"model.width": 64, "data.length": 16, "training.batch_size": 8, "training.budget": 2}
"""Wide enough for the names and shapes in a checkpoint's files to be less than 5 % of it."""
FIXED = {"recurrence.distribution": "fixed"}
BLOCKS = {"blocks.num": 2, "model.num_core_layers": 2}
RULES = {
    "denoise": {"objective": "denoise", "denoise.context": "context", "optim.ema_decay": 0.9},
    "blockwise": {"objective": "blockwise", "training.accumulation": 2} | BLOCKS,
    "truncated": {"objective": "truncated"} | FIXED, "full": {"objective": "full", "model.tie_embeddings": False},
    "ar": {"objective": "ar"}, "masked": {"objective": "masked"},
    "task": {"objective": "truncated", "task.name": "prefix-sums", "task.difficulty": [12, 12]} | FIXED,
    "task of a range": {"objective": "full", "task.name": "prefix-sums", "task.difficulty": [4, 12]},
    "Muon": {"objective": "ar", "optim.name": "muon"},
    "checkpointed": {"objective": "full", "training.checkpoint_activations": True},
    "frozen": {"objective": "blockwise", "blocks.alone": 0, "blocks.shared": "frozen"} | BLOCKS,
}


@pytest.fixture(scope="module")
def configs(tiny):
    return {name: tiny(**WIDE | changes) for name, changes in RULES.items()}


@pytest.fixture(scope="module")
def by_two(configs, tmp_path_factory):
    """(config, measured) of every config under DDP and FSDP, by name."""
    folder = tmp_path_factory.mktemp("two")
    both = {f"{name}-{shard}": config.replace(**{"training.shard": shard})
            for name, config in configs.items() for shard in ("none", "fsdp")}
    (folder / "configs.json").write_text(json.dumps(
        {name: yaml.safe_load(dump_config(config)) for name, config in both.items()}), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               Path(__file__).parent / "measured_runs.py", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-6000:]
    measured = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    return {name: (config, measured[name]) for name, config in both.items()}


def planned(config, devices):
    """The figures of `measure` as the plan has them."""
    found = plan(config, vocab_size_of(config), devices=devices)
    memory, sharded = found.memory, config.training.shard == "fsdp"
    return {"weights": memory.weights, "gradients": memory.gradients, "optimiser": memory.optimiser,
            "averages": memory.averages, "activations": memory.activations, "sent": found.sent,
            "summed": 0 if sharded else memory.during, "gathered": found.gathered,
            "flops": found.step_flops + found.counts.again_flops + found.update_flops,
            "checkpoint": found.counts.checkpoint_bytes}


@pytest.mark.parametrize("name", RULES)
def test_the_plan_of_one_process_is_what_it_has(configs, tmp_path, name):
    assert measure(configs[name], tmp_path / "run") == pytest.approx(planned(configs[name], 1), rel=0.05)


@pytest.mark.slow
def test_the_plan_of_two_processes_is_what_each_of_them_has(by_two):
    for name, (config, measured) in by_two.items():
        assert measured == pytest.approx(planned(config, 2), rel=0.05), name


def test_a_plan_of_another_width_is_further_off(configs, tmp_path):
    """Positive control."""
    measured, wider = measure(configs["ar"], tmp_path / "run"), configs["ar"].replace(**{"model.width": 80})
    for name, figure in planned(wider, 1).items():
        assert not figure or figure > 1.1 * measured[name], name
