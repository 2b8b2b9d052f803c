"""Weights are cast once per step under autocast, with the same bits, and never after they have changed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from looped.config.model import ModelConfig
from looped.models.language import LanguageModel
from looped.nn.cast_once import cast, casts_kept

TOKENS = torch.arange(24).view(2, 12)
STEPS = 6


class Casts(TorchDispatchMode):
    """Counts the casts of the weights of a model."""

    def __init__(self, model):
        super().__init__()
        self.places = {weight.data_ptr() for weight in model.parameters() if weight.ndim == 2}
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.num += args[0].data_ptr() in self.places
        return func(*args, **kwargs or {})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(width=16, num_heads=2, num_prelude_layers=1, num_core_layers=1, num_coda_layers=1,
                                     state_init="zero", block="sandwich"), 32)


def gradients(model, depth=STEPS):
    """(gradients, number of weight casts) of a step under bf16."""
    model.zero_grad()
    with Casts(model) as casts:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(TOKENS, depth).float().logsumexp(-1).mean()
        loss.backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None], casts.num


def test_a_deep_loop_casts_its_weights_as_often_as_a_shallow_one(model):
    before, often = gradients(model)
    with casts_kept():
        after, once = gradients(model)
    with casts_kept():
        _, shallow = gradients(model, 1)
    for ours, theirs in zip(after, before, strict=True):
        assert torch.equal(ours, theirs)
    assert once == shallow
    # The projection of the feed-forward network, cast forward and backward in prelude, coda and every loop step before.
    assert often - once == 2 * (2 + STEPS) - 3


def test_casts_end_with_their_context(model):
    weight = model.head.weight if model.head is not None else model.embed.weight
    with casts_kept():
        first = cast(weight, torch.bfloat16)
        assert cast(weight, torch.bfloat16) is first
        with casts_kept():
            assert cast(weight, torch.bfloat16) is not first
        assert cast(weight, torch.bfloat16) is first
    assert cast(weight, torch.bfloat16) is not first
    assert cast(weight, torch.float32) is weight


def test_a_weight_that_has_changed_is_never_taken_for_its_old_cast(model):
    weight = model.embed.weight
    with casts_kept():
        cast(weight, torch.bfloat16)
        with torch.no_grad():
            weight.add_(1)
        with pytest.raises(RuntimeError, match="a weight has changed inside casts_kept"):
            cast(weight, torch.bfloat16)
