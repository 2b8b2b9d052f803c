"""Every injection in every kind of layer can be trained under bf16, to the loss that float32 gives."""

import pytest
import torch

from looped.config import load_config
from looped.models.build import build
from looped.objectives import build_objective
from looped.rng import StepRandom


@pytest.mark.parametrize("block", ["prenorm", "sandwich"])
@pytest.mark.parametrize("injection", ["none", "add", "linear", "gated", "diagonal"])
@pytest.mark.parametrize("objective", ["truncated", "denoise", "masked"])
def test_every_injection_trains_under_bf16(objective, injection, block):
    config = load_config(None, {"objective": objective, "model.injection": injection, "model.block": block,
                                "model.width": 16, "model.num_heads": 2, "recurrence.mean": 2})
    rule = build_objective(config, build(config, 30))
    tokens = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = rule(tokens, StepRandom(0, 0, count=2)).value
    loss.backward()
    exact = rule(tokens, StepRandom(0, 0, count=2)).value
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
