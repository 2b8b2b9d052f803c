"""Noise on the path of a loop in training: a function of (seed, step, sequence, loop step) alone, and nothing at 0."""

import pytest
import torch
from torch import nn

from looped.config import load_config
from looped.config.rules import RANDOM_STARTS
from looped.models.build import build
from looped.nn.recurrence import STATE_INITS, RecurrentDepth
from looped.nn.state_noise import StateNoise, with_noise
from looped.objectives import build_objective
from looped.rng import StepRandom
from looped.training.draw_ahead import StepDraws

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

B, L, D = 5, 3, 8
TINY = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "recurrence.mean": 3, "data.length": 8,
        "recurrence.backprop": 2, "supervision.segments": 2, "model.state_init": "like-init",
        "evaluation.prompt_length": 4, "fixed_point.max_steps": 4}
NOISY = ("full", "truncated", "progressive", "one-step")


class Toy(nn.Module):
    """A core that squeezes the state and the input."""

    def forward(self, state, e, cond=None):
        return torch.tanh(0.7 * state + e)


def e():
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(0))


def random(**rows):
    return StepRandom(3, 7, **{"count": B} | rows)


def made(objective, **settings):
    config = load_config(None, TINY | {"objective": objective} | settings)
    torch.manual_seed(0)
    return build_objective(config, build(config, 257))


def tokens(num=4):
    return torch.randint(257, (num, 9), generator=torch.Generator().manual_seed(1))


def test_the_noise_has_the_given_size_relative_to_each_row():
    state = torch.randn(1, 2, 200_000) * torch.tensor([[[0.5], [4.0]]]) + 1
    added = with_noise(state, torch.randn(state.shape, generator=torch.Generator().manual_seed(0)), 0.1) - state
    expected = 0.1 * state.pow(2).mean(-1).sqrt()
    torch.testing.assert_close(added.std(-1), expected, rtol=0.01, atol=0)
    assert with_noise(torch.zeros(1, 2, 4), torch.ones(1, 2, 4), 0.3).abs().sum() == 0


def test_an_unroll_adds_it_before_each_step():
    loop, noise = RecurrentDepth(Toy(), state_init="embedding"), StateNoise(0.3, random())
    state = e()
    for step in range(3):
        eps = random().normal(f"state noise {step}", (L, D))
        state = torch.tanh(0.7 * (state + 0.3 * state.pow(2).mean(-1, keepdim=True).sqrt() * eps) + e())
    found = loop.unroll(e(), no_grad=1, grad=2, disturb=noise)
    torch.testing.assert_close(found, state)
    assert not torch.allclose(found, loop.unroll(e(), no_grad=1, grad=2))  # the control


def test_a_sequence_has_the_same_noise_at_any_depth_of_the_others():
    loop, noise = RecurrentDepth(Toy(), state_init="embedding"), StateNoise(0.3, random())
    no_grad, grad = torch.tensor([2, 0, 3, 1, 0]), torch.tensor([1, 2, 2, 1, 3])
    together = loop.unroll(e(), no_grad=no_grad, grad=grad, disturb=noise)
    for row in range(B):
        alone = loop.unroll(e(), no_grad=int(no_grad[row]), grad=int(grad[row]), disturb=noise)
        torch.testing.assert_close(together[row], alone[row])


def test_each_tensor_of_a_state_has_its_own_noise():
    first, second = StateNoise(0.3, random())((e(), e()), 0)
    assert not torch.allclose(first, second)
    one, two = StateNoise(0.3, random())((e()[:2], e()[:2]), [0, 0], [0, 1])
    assert torch.equal(one, first[:2])
    assert torch.equal(two, second[:2])


def test_noise_goes_on_where_an_unroll_does():
    loop, noise = RecurrentDepth(Toy(), state_init="embedding"), StateNoise(0.3, random())
    whole = loop.unroll(e(), no_grad=0, grad=3, disturb=noise)
    begun = loop.unroll(e(), no_grad=0, grad=2, disturb=noise)
    assert torch.equal(loop.unroll(e(), no_grad=0, grad=1, state=begun, first=2, disturb=noise), whole)
    assert not torch.equal(loop.unroll(e(), no_grad=0, grad=1, state=begun, disturb=noise), whole)  # the control


def test_draws_of_some_rows_are_those_of_all_and_no_gradient_goes_through_the_size():
    rows = [3, 1]
    assert torch.equal(random().of(rows).normal("x", (2,)), random().normal("x", (2,))[rows])
    ahead = StepDraws(random(), {("normal", "x", (2,)): torch.zeros(B, 2)})
    assert torch.equal(ahead.of(rows).normal("x", (2,)), random().normal("x", (2,))[rows])
    state = torch.randn(1, 1, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(with_noise(state, torch.ones(1, 1, 4), 0.5).sum(), state)
    assert torch.equal(grad, torch.ones(1, 1, 4))


@pytest.mark.parametrize("objective", NOISY)
def test_training_is_noisy_where_asked_and_the_same_in_any_micro_batches(objective):
    """Truncated draws a depth per sequence. Without noise the loss is that of the setting's absence."""
    rule, plain = made(objective, **{"recurrence.state_noise": 0.2}), made(objective)
    with torch.no_grad():
        whole = rule(tokens(), StepRandom(0, 1, count=4, total=4)).value
        parts = [rule(tokens()[first : first + 2], StepRandom(0, 1, start=first, count=2, total=4)).value
                 for first in (0, 2)]
        torch.testing.assert_close(torch.stack(parts).mean(), whole)
        assert not torch.allclose(whole, rule(tokens(), StepRandom(1, 1, count=4, total=4)).value)
        assert not torch.allclose(whole, plain(tokens(), StepRandom(0, 1, count=4, total=4)).value)


@pytest.mark.parametrize("objective", ["ar", "fixed-point"])
def test_rules_without_a_path_add_no_noise(objective):
    pytest.importorskip("torchdeq")
    losses = [made(objective, **{"recurrence.state_noise": noise})(tokens(), StepRandom(0, 1, count=4)).value
              for noise in (0.0, 0.5)]
    assert losses[0] == losses[1]


def test_the_random_starts_of_a_config_are_those_of_the_loop():
    loops = {name: RecurrentDepth(Toy(), state_init=name, width=4) for name in STATE_INITS}
    assert tuple(name for name, loop in loops.items() if loop.needs_noise) == RANDOM_STARTS
