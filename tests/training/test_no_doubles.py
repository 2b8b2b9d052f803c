"""Every rule on every kind of data trains and is measured on a device without float64, as Apple's, and there computes
what it computes on a CPU; nothing of the CPU is mixed with it.

The device is a stand-in (`no_doubles`), whose numbers are those of the CPU: equal seeds have to give equal weights, but
for what is float64 on a CPU and float32 there.
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from no_doubles import OnDevice, no_doubles

from looped.config import load_config
from looped.config.training import OptimConfig
from looped.data.from_config import open_data
from looped.models.build import build
from looped.objectives import build_objective
from looped.rng import StepRandom
from looped.training.heldout import heldout_figures, heldout_samples
from looped.training.optim import EMA, build_optimizers
from looped.training.trainer import Trainer

BLOCKS = {"blocks.num": 2, "model.num_core_layers": 2}
ADAPTIVE = {"denoise.noise.distribution": "adaptive"}

TEXT = {
    "denoise": {}, "adaptive": ADAPTIVE | {"denoise.noise.share_at_max": 0.2}, "concat": {"denoise.context": "concat"},
    "context": {"denoise.context": "context", "denoise.weight": "edm"},
    "steps": {"denoise.train_steps": 2}, "carry": {"denoise.carry": "estimate"},
    "rows": {"denoise.block_size": 2, "denoise.evidence_in": True, "denoise.solver": "ancestral"},
    "in order": {"denoise.block_size": 2, "denoise.order": "left-to-right", "denoise.solver": "ancestral"},
    "sampled": {"denoise.bridge": "sampled", "denoise.solver": "heun"},
    "blockwise": {"objective": "blockwise"} | BLOCKS, "full": {"objective": "full"},
    "truncated": {"objective": "truncated", "model.state_init": "like-init"},
    "progressive": {"objective": "progressive"}, "one-step": {"objective": "one-step"}, "ar": {"objective": "ar"},
    "fixed-point": {"objective": "fixed-point"}, "masked": {"objective": "masked", "evaluation.levels": 2},
    "masked blocks": {"objective": "masked", "masked.cond_width": 8, "evaluation.levels": 2} | BLOCKS,
}
TASK = {
    "denoise": ADAPTIVE, "surest": {"denoise.order": "confidence", "denoise.settled": "surest"},
    "trajectories": {"evaluation.trajectories": 2, "evaluation.choose": "consistent"}, "blockwise": BLOCKS | {
        "objective": "blockwise"}, "truncated": {"objective": "truncated"}, "one-step": {"objective": "one-step"},
}
IMAGES = {
    "denoise": {"denoise.context_dropout": 0.5, "denoise.guidance": 2.0},
    "noprop-dt": {"objective": "noprop-dt"} | BLOCKS, "noprop-ct": {"objective": "noprop-ct"},
    "euler": {"objective": "noprop-ct", "noprop.solver": "euler"}, "noprop-fm": {"objective": "noprop-fm"},
    "forward-forward": {"objective": "forward-forward", "model.injection": "none", "model.num_core_layers": 2},
    "hard": {"objective": "forward-forward", "model.injection": "none", "model.num_core_layers": 2,
             "forward_forward.negatives": "hard"}, "truncated": {"objective": "truncated"},
}
PIXELS = {"denoise": {}, "blockwise": {"objective": "blockwise", "denoise.guidance": 2.0} | BLOCKS}
KINDS = {"text": TEXT, "task": TASK, "classify": IMAGES, "generate": PIXELS}
TOGETHER = ("steps", "carry", "rows", "in order", "sampled", "progressive", "full", "masked", "hard", "euler")
"""Cases whose operations are those of others as well."""
CASES = [pytest.param(kind, name, marks=[pytest.mark.slow] * (name in TOGETHER))
         for kind, rules in KINDS.items() for name in rules]

COMMON = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "recurrence.mean": 2,
          "recurrence.backprop": 1, "denoise.cond_width": 8, "denoise.target.dim": 4, "training.batch_size": 4,
          "evaluation.depths": [1, 2], "evaluation.sample_depths": [2], "evaluation.num_samples": 2,
          "evaluation.num_problems": 4, "evaluation.num_sequences": 2, "evaluation.sample_length": 4,
          "evaluation.prompt_length": 2, "evaluation.batch_size": 128}
OF_IMAGES = {"images.source": "digits", "images.max_heldout": 16, "model.patch_size": 4, "denoise.context": "inject",
             "model.num_prelude_layers": 0, "model.num_coda_layers": 0}
OF_KIND = {
    "text": {"data.vocab_size": 260, "data.length": 8},
    "task": {"task.name": "prefix-sums", "task.difficulty": [2, 4], "denoise.context": "inject"}, "classify": OF_IMAGES,
    "generate": OF_IMAGES | {"images.goal": "generate", "model.injection": "none", "denoise.weight": "edm",
                             "denoise.solver": "heun", "denoise.schedule": "karras"},
}


def trained(config, data, device):
    """A model after two steps of plain gradient descent, which does not magnify a rounding; its figures and samples."""
    objective = build_objective(config, build(config, data.vocab_size, data.picture)).to(device).train()
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1, foreach=False)
    settings = Trainer.batch_settings(SimpleNamespace(config=config))
    for step in range(2):
        batch = data.train.batch(step, rows=range(4), **settings)
        loss = objective(batch.to(device), StepRandom(0, step, count=4, device=device))
        loss.value.backward()
        assert {name: float(value) for name, value in loss.metrics.items()}
        optimizer.step()
        objective.after_step()
        objective.zero_grad()
    objective.eval()
    with torch.no_grad():
        return objective, heldout_figures(objective, data, config), heldout_samples(objective, data, config)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_rule_trains_and_is_measured_without_float64_as_on_a_cpu(kind, name, tiny):
    if kind in ("classify", "generate"):
        pytest.importorskip("sklearn")
    settings = COMMON | OF_KIND[kind] | KINDS[kind][name]
    config = tiny(**settings) if kind == "text" else load_config(None, settings)
    data = open_data(config)
    ours = trained(config, data, torch.device("cpu"))
    with no_doubles() as device:
        theirs = trained(config, data, device)
        assert all(isinstance(parameter, OnDevice) for parameter in theirs[0].parameters())
        for (key, a), b in zip(ours[0].state_dict().items(), theirs[0].state_dict().values(), strict=True):
            torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-5, msg=lambda said, key=key: f"{key}: {said}")
    assert theirs[1] == pytest.approx(ours[1], rel=1e-4)
    assert np.array_equal(theirs[2], ours[2])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimisers_and_averages_need_no_float64(name):
    with no_doubles() as device:
        module = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(4, 4)])[0], torch.nn.LayerNorm(4)).to(device)
        optimizers, ema = build_optimizers(module, OptimConfig(name=name)), EMA(module, 0.5)
        module(torch.ones(2, 4).to(device)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        ema.update(module, 0)
        assert all(isinstance(average, OnDevice) and average.isfinite().all() for average in ema.averages)


def test_the_stand_in_refuses_float64_and_mixed_devices():
    """The positive control."""
    with no_doubles() as device:
        there = torch.ones(3).to(device)
        with pytest.raises(TypeError, match="float64"):
            there.double()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(3, dtype=torch.float64).to(device)
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(3, dtype=torch.float64, device=device)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(3)[there > 0]
        assert isinstance(copy.deepcopy(there)[torch.tensor([0, 1])] * torch.tensor(2.0), OnDevice)
