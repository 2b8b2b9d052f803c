"""Training steps of every rule on a device, pretended: the host reads once a step, at its end."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pretend_device
import pytest
import torch
from pretend_device import Counts, pretend

from looped.config import load_config
from looped.training import processes
from looped.training.train import open_trainer

pytestmark = pytest.mark.usefixtures("unchecked")  # the checks of shapes would read and copy as well

CONFIGS = Path(__file__).parents[2] / "configs"
RULES = {
    "ar": {"objective": "ar"}, "full": {"objective": "full"}, "progressive": {"objective": "progressive"},
    "truncated, a depth per sequence": {"objective": "truncated"},
    "truncated, a depth per batch": {"objective": "truncated", "recurrence.per_sequence": False},
    "one-step": {"objective": "one-step"},
    "denoise inject": {"objective": "denoise", "denoise.context": "inject"},
    "denoise concat": {"objective": "denoise", "denoise.context": "concat"},
    "denoise context": {"objective": "denoise", "denoise.context": "context"},
    "denoise, adaptive noise": {"objective": "denoise", "denoise.noise.distribution": "adaptive"},
    "denoise, a level per token": {"objective": "denoise", "denoise.order": "left-to-right", "denoise.block_size": 4},
    "denoise, two steps": {"objective": "denoise", "denoise.train_steps": 2, "denoise.carry": "latent"},
    "blockwise": {"objective": "blockwise", "blocks.num": 3, "model.num_core_layers": 3},
    "masked": {"objective": "masked", "blocks.num": 3, "model.num_core_layers": 3, "model.state_init": "zero"},
    "ar, EMA": {"objective": "ar", "optim.ema_decay": 0.9}, "ar, Muon": {"objective": "ar", "optim.name": "muon"},
    "ar, micro-batches": {"objective": "ar", "training.accumulation": 2},
}
TWICE = {"denoise, adaptive noise", "sudoku, surest first", "mazes, denoise"}
"""Rules with a second read: of the losses by level, on CUDA a copy that arrives while the backward pass runs
(`HostCopy`); and of the cells that the model is surest of, since noise levels on the host depend on them."""
SMALL = {"model.width": 16, "model.num_heads": 2, "training.batch_size": 4, "training.budget": 8, "training.threads": 1,
         "training.budget_unit": "steps", "training.clock": "wall", "evaluation.num_sequences": 4}
OTHERS = {
    "sudoku, denoise": ("sudoku4-denoise", {}), "sudoku, full": ("sudoku4-denoise", {"objective": "full"}),
    "sudoku, truncated": ("sudoku4-denoise", {"objective": "truncated"}),
    "sudoku, surest first": ("sudoku4-denoise", {"denoise.settled": "surest", "denoise.order": "confidence"}),
    "mazes, denoise": ("maze-denoise", {}), "mazes, full": ("maze-denoise", {"objective": "full"}),
    "sums, denoise": ("sums-denoise", {}), "sums, full": ("sums-denoise", {"objective": "full"}),
    "digits, denoise": ("digits-denoise", {}), "digits, ar": ("digits-denoise", {"objective": "ar"}),
    "digits, generated blockwise": ("digits-generate", {}),
}
"""Data kind and rule -> (a shipped config, changes)."""


def shipped(name, changes):
    """A small variant of a shipped config."""
    return load_config(CONFIGS / f"{name}.yaml", SMALL | changes)


def accelerator_on(device):
    """The accelerator of a run of one process on a device."""
    def clip(parameters, most):
        return torch.nn.utils.clip_grad_norm_(list(parameters), most)

    return SimpleNamespace(
        device=device, mixed_precision="no", num_processes=1, process_index=0, is_main_process=True,
        prepare_model=lambda model: model,
        no_sync=lambda model: nullcontext(), backward=lambda loss: loss.backward(), clip_grad_norm_=clip,
        reduce=lambda tensor, how: tensor, autocast=nullcontext, unwrap_model=lambda model, **_: model,
        wait_for_everyone=lambda: None)


@pytest.fixture
def traffic(tmp_path, monkeypatch):
    """`traffic(config)`: the counts of the last of three training steps."""
    def measure(config):
        with pretend(grad=True) as device:
            monkeypatch.setattr(processes, "start_accelerator", lambda config: accelerator_on(device))
            with open_trainer(config, tmp_path / "run", evaluate=lambda *_: {}, quiet=True) as trainer:
                for _ in range(3):
                    pretend_device.seen = counts = Counts()
                    trainer.train_step()
                pretend_device.seen = Counts()  # not what saving reads
            return counts

    return measure


def check(counts, reads):
    """One read per step and no wait for a copy, of a step that did its work on the device."""
    assert sum(counts.kernels.values()) > 100
    assert sum(counts.reads.values()) == reads, counts.reads
    assert not counts.waits


@pytest.mark.parametrize("rule", RULES)
def test_the_host_reads_the_device_once_a_step_and_waits_for_no_copy(traffic, tiny, rule):
    check(traffic(tiny(**RULES[rule])), 1 + (rule in TWICE))


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_data_are_read_once_a_step_too(traffic, kind):
    check(traffic(shipped(*OTHERS[kind])), 1 + (kind in TWICE))
