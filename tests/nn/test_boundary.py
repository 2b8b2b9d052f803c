"""The parts between two loop steps against closed forms, and the index that a loop tells them."""

import math

import pytest
import torch
from torch import nn

from looped.errors import UserError
from looped.nn.blocks import Core
from looped.nn.boundary import AddedStep, Boundary, ScaledUpdate, StepFeatures, StepModulation, Streams, ToldStep
from looped.nn.recurrence import RecurrentDepth

B, L, D = 5, 3, 4


class Affine(nn.Module):
    """A core that mixes the coordinates of each row, and adds what it is told of the step."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, state, e, cond=None):
        told = 0 if cond is None else cond.mean(-1).view(-1, 1, 1)
        return torch.tanh(self.linear(state) + e + told)


def loop_with(*parts):
    torch.manual_seed(0)
    loop = RecurrentDepth(Core(Affine()), boundary=Boundary(*parts)).double()
    with torch.no_grad():
        for weight in loop.boundary.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return loop


def inputs(seed=1):
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_features_of_a_step_are_sinusoids_of_its_logarithm_and_zero_at_the_first():
    features = StepFeatures()
    w = [2 ** (-2 + 4 * k / 7) for k in range(8)]
    for t in (0, 1, 5, 100_000):
        u = math.log(1 + t)
        wanted = [math.sin(each * u) for each in w] + [1 - math.cos(each * u) for each in w]
        torch.testing.assert_close(features(t), torch.tensor([wanted]), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(features(torch.tensor([t, 3]))[:1], features(t), atol=0, rtol=0)
    assert not features(0).any()


def test_a_step_without_its_index_is_refused_where_it_is_needed_and_only_there():
    e = inputs()
    with pytest.raises(UserError, match="so a single step needs its index"):
        loop_with(AddedStep(D)).step(e, e)
    loop_with(ScaledUpdate(3)).step(e, e)


def test_a_cond_that_the_step_would_replace_is_refused():
    e, cond = inputs(), torch.ones(B, 16, dtype=torch.float64)
    with pytest.raises(UserError, match="ToldStep gives the core its step as cond, and cond= was given too"):
        loop_with(ToldStep())(e, 2, cond=cond)
    added = loop_with(AddedStep(D))
    assert not torch.equal(added(e, 2, cond=cond), added(e, 2))


@pytest.mark.parametrize("part", [lambda: AddedStep(D), ToldStep], ids=["add", "told"])
def test_sequences_of_several_depths_are_told_the_steps_that_each_has_run(part):
    """In either round, with and without gradient, and going on from a state after some steps."""
    loop, e = loop_with(part()), inputs()
    no_grad, grad = torch.tensor([3, 0, 1, 2, 0]), torch.tensor([1, 2, 3, 1, 0])
    for first in (0, 6):
        together = loop.unroll(e, no_grad=no_grad, grad=grad, first=first)
        for row in range(B):
            alone = loop.unroll(e[row : row + 1], no_grad=int(no_grad[row]), grad=int(grad[row]), first=first)
            torch.testing.assert_close(together[row : row + 1], alone)
    # The control: a loop that began its count anew would give other states.
    assert (loop.unroll(e, no_grad=0, grad=4, first=6) - loop.unroll(e, no_grad=0, grad=4)).abs().max() > 1e-3


def test_a_loop_that_goes_on_from_its_state_is_the_loop_in_one_go():
    e, seen = inputs(), []

    def count(index, state):
        seen.append(index)

    for loop in (loop_with(AddedStep(D)), loop_with(ToldStep(), ScaledUpdate(4), Streams(D, 3, dynamic=True))):
        whole = loop.unroll(e, no_grad=0, grad=2, state=loop(e, 3), first=3, callback=count)
        torch.testing.assert_close(whole, loop(e, 5))
    assert seen == [3, 4, 3, 4]


def test_an_added_step_is_a_linear_map_of_the_features():
    loop, e, x = loop_with(AddedStep(D)), inputs(), inputs(2)
    part = loop.boundary.parts[0]
    shifted = x + part.features(2).double() @ part.weight.T
    torch.testing.assert_close(loop.step(x, e, index=2), loop.core(shifted, e))


def test_a_modulation_by_the_step_leaves_the_first_step_plain_for_any_weights():
    modulation, features = StepModulation(D), StepFeatures()
    with torch.no_grad():
        modulation.linear.weight.normal_()
    for shift, scale, gate in modulation(features(0)):
        assert torch.equal(torch.cat([shift, scale, gate - 1]), torch.zeros(3, 1, D))
    assert all(part.any() for parts in modulation(features(3)) for part in parts)


def test_a_scaled_update_is_one_nth_of_the_change():
    loop, e, x = loop_with(ScaledUpdate(5)), inputs(), inputs(2)
    torch.testing.assert_close(loop.step(x, e), x + (loop.core(x, e) - x) / 5)


def test_streams_are_hyper_connections():
    """The paper's form, H <- R H + w (core(r . H) - r . H), has R = M + w r."""
    loop, e = loop_with(Streams(D, 3)), inputs()
    part, core = loop.boundary.parts[0], loop.core
    r, w, m = part.read, part.write, part.mix.view(3, 3)
    state = torch.stack([inputs(seed) for seed in (2, 3, 4)], 2)
    x = sum(r[j] * state[:, :, j] for j in range(3))
    update, residual = core(x, e) - x, m + torch.outer(w, r)
    wanted = torch.stack([sum(residual[i, j] * state[:, :, j] for j in range(3)) + w[i] * update for i in range(3)], 2)
    torch.testing.assert_close(loop.step(state, e), wanted)
    torch.testing.assert_close(loop.leave(state), sum(part.last[j] * state[:, :, j] for j in range(3)))


def test_dynamic_streams_add_bounded_functions_of_each_normalised_stream():
    loop, e = loop_with(Streams(D, 2, dynamic=True)), inputs()
    part, core = loop.boundary.parts[0], loop.core
    state, (v, s) = torch.stack([inputs(2), inputs(3)], 2), (part.dynamic.weight, part.dynamic.scale)
    got = loop.step(state, e)
    for b, row in ((0, 0), (B - 1, L - 1)):
        h = state[b, row]
        more = s * torch.tanh(h / h.square().mean(-1, keepdim=True).sqrt() @ v.T)
        r, w = part.read + more[:, 0], part.write + more[:, 1]
        m = part.mix.view(2, 2) + more[:, 2:].T
        new = core((r @ h).expand(B, L, D), e)[b, row]
        torch.testing.assert_close(got[b, row], m @ h + torch.outer(w, new), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_fresh_streams_are_the_plain_loop_to_the_bit_beside_moving_averages_of_it(dynamic):
    torch.manual_seed(0)
    plain, part = RecurrentDepth(Core(Affine())), Streams(D, 4, dynamic=dynamic)
    loop, e, states = RecurrentDepth(plain.core, boundary=Boundary(part)), inputs().float(), []
    average = torch.zeros(B, L, D)
    plain(e, 6, callback=lambda index, state: states.append(state))
    for depth, state in enumerate(states, start=1):
        streams = loop(e, depth)
        assert torch.equal(loop.leave(streams), state)
        average = 0.75 * average + 0.25 * state
        torch.testing.assert_close(streams[:, :, 2], average)


@pytest.mark.parametrize("parts", [
    lambda: [AddedStep(D), Streams(D, 2)], lambda: [ToldStep(), ScaledUpdate(3), Streams(D, 4, dynamic=True)]])
def test_gradients_reach_every_weight_of_a_fresh_boundary_within_two_steps_of_training(parts):
    """From the start, but those of streams that nobody reads yet."""
    torch.manual_seed(0)
    loop, e = RecurrentDepth(Core(Affine()), boundary=Boundary(*parts())), inputs().float()
    optimizer = torch.optim.SGD(loop.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loop.leave(loop(e, 4)).square().mean().backward()
        optimizer.step()
    assert all(weight.grad.abs().sum() > 0 for weight in loop.parameters())
