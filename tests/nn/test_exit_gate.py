"""The exit gate against its equations, written out in float64; and a model that has none is as it was."""

import pytest
import torch

from looped.config import load_config
from looped.data.image_batches import ImageSpec
from looped.errors import UserError
from looped.models.build import build
from looped.nn.exit_gate import ExitGate, gate_of, log_chances

SMALL = {"objective": "full", "model.width": 16, "model.num_heads": 2, "model.tie_embeddings": False}


def test_the_chances_of_passes_are_those_of_the_paper():
    """p_i = lambda_i times (1 - lambda_j) of all j < i; the last has what is left, and all add up to 1."""
    odds = 2 * torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaves, stays = 1 / (1 + torch.exp(-odds)), torch.ones(3, 4, dtype=torch.float64)
    for i, found in enumerate(log_chances(odds).exp()):
        torch.testing.assert_close(found, stays * leaves[i] if i < 4 else stays, rtol=1e-12, atol=0)
        stays = stays * (1 - leaves[i])
    torch.testing.assert_close(log_chances(odds).exp().sum(0), torch.ones(3, 4, dtype=torch.float64))


def test_far_odds_have_chances_and_gradients():
    odds = torch.tensor([200.0, -200.0, 0.0]).view(3, 1, 1).requires_grad_()
    log_p = log_chances(odds)
    assert log_p.flatten().tolist() == [0.0, -400.0, -200.0]
    (log_p.exp() * log_p).sum().backward()
    assert odds.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_gate_is_a_linear_map_in_float32_or_wider(dtype):
    gate, state = ExitGate(16), torch.randn(2, 5, 16).to(dtype)
    gate.weight.data, gate.bias.data = torch.randn(1, 16), torch.randn(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = gate(state)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), state.double() @ gate.weight[0].double() + gate.bias.double(), rtol=1e-5,
                               atol=1e-5)


@pytest.mark.parametrize("flags", [{}, {"blocks.num": 2, "recurrence.mean": 4}, {"images.source": "digits"}], ids=str)
def test_a_gate_leaves_the_other_weights_as_they_are(flags):
    """It draws nothing, learns nothing unasked, and says 1/2."""
    picture = ImageSpec(1, 8, 8, 4) if flags.get("images.source") else None
    plain, gated = (build(load_config(None, SMALL | flags | {"model.exit_gate": on}), 20, picture)
                    for on in (False, True))
    ours, theirs = plain.state_dict(), gated.state_dict()
    assert theirs.keys() - ours.keys() == {"exit_gate.weight", "exit_gate.bias"}
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())
    assert not [p for p in gated.exit_gate.parameters() if p.requires_grad]
    assert not gated.exit_gate(torch.randn(2, 3, 16)).any()
    with pytest.raises(UserError, match=r"this model has none; set model.exit_gate to true"):
        gate_of(plain)
