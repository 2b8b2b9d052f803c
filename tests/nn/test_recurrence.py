"""The loop: any module as the core, gradients only where asked, one depth a sequence, equal to looping by hand."""

import pytest
import torch
from torch import nn

from looped.errors import UserError
from looped.nn.blocks import Core
from looped.nn.injection import INJECTIONS, Diagonal, build_injection
from looped.nn.recurrence import STATE_INITS, RecurrentDepth

B, L, D = 5, 3, 8


class Toy(nn.Module):
    """A user's own core: it counts calls and knows nothing of this package."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 * D, D)
        self.rows = []

    def forward(self, state, e, cond=None):
        self.rows.append(len(state))
        return torch.tanh(self.linear(torch.cat([state, e], -1)))


@pytest.fixture
def e():
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(0))


def by_hand(core, e, steps, row):
    state = torch.zeros_like(e[row : row + 1])
    for _ in range(steps):
        state = core(state, e[row : row + 1])
    return state


@pytest.mark.parametrize("wrap", [lambda core: core, Core], ids=["any module", "Core"])
def test_any_module_can_be_the_core(e, wrap):
    core = Toy()
    out = RecurrentDepth(wrap(core))(e, num_steps=4)
    torch.testing.assert_close(out[2:3], by_hand(core, e, 4, 2))


@pytest.mark.parametrize("depths", [3, torch.tensor([3, 1, 0, 3, 2])], ids=["one depth", "a depth per sequence"])
def test_a_damped_step_keeps_a_fraction_of_the_state_before_it(e, depths):
    core = Toy()
    out = RecurrentDepth(core).unroll(e, no_grad=0, grad=depths, damping=0.25)
    for row in range(B):
        state = torch.zeros_like(e[:1])
        for _ in range(int(torch.as_tensor(depths).expand(B)[row])):
            state = 0.25 * state + 0.75 * core(state, e[row : row + 1])
        torch.testing.assert_close(out[row : row + 1], state)


def test_truncation_cuts_the_gradient_of_early_steps(e):
    loop = RecurrentDepth(Toy())
    start = torch.zeros(B, L, D, requires_grad=True)
    loop.unroll(e, no_grad=0, grad=3, state=start).sum().backward()
    assert start.grad.abs().sum() > 0  # positive control: without truncation it arrives
    with_cut = loop.unroll(e, no_grad=1, grad=2, state=start)
    assert torch.autograd.grad(with_cut.sum(), start, allow_unused=True) == (None,)
    torch.testing.assert_close(with_cut, loop.unroll(e, no_grad=0, grad=3, state=start))


def test_truncated_gradient_is_that_of_the_last_steps_alone(e):
    loop = RecurrentDepth(Toy())
    middle = loop.unroll(e, no_grad=3, grad=0)
    direct = torch.autograd.grad(loop.unroll(e, no_grad=3, grad=2).sum(), list(loop.parameters()))
    resumed = torch.autograd.grad(loop.unroll(e, no_grad=0, grad=2, state=middle).sum(), list(loop.parameters()))
    for a, b in zip(direct, resumed, strict=True):
        torch.testing.assert_close(a, b)


def test_depth_by_sequence_equals_one_sequence_at_a_time_in_value_and_gradient(e):
    core = Toy()
    loop = RecurrentDepth(core)
    no_grad, grad = torch.tensor([0, 4, 0, 2, 1]), torch.tensor([3, 3, 1, 3, 3])
    together = loop.unroll(e, no_grad=no_grad, grad=grad)
    alone = [loop.unroll(e[b : b + 1], no_grad=int(no_grad[b]), grad=int(grad[b])) for b in range(B)]
    torch.testing.assert_close(together, torch.cat(alone))
    ours = torch.autograd.grad(together.square().sum(), list(core.parameters()))
    theirs = torch.autograd.grad(torch.cat(alone).square().sum(), list(core.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


ANY_DEPTHS = [([4, 0, 0, 0, 1], [1, 4, 2, 3, 0]), ([0, 0, 0, 0, 0], [1, 5, 2, 0, 3]), ([3, 1, 4, 1, 5], [0] * 5),
              ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0])]


@pytest.mark.parametrize(("no_grad", "grad"), ANY_DEPTHS)
@pytest.mark.parametrize("state_init", ["zero", "embedding"])
def test_any_depths_by_sequence_equal_one_sequence_at_a_time(e, no_grad, grad, state_init):
    core = Toy()
    loop, e = RecurrentDepth(core, state_init=state_init), e.requires_grad_()
    together = loop.unroll(e, no_grad=torch.tensor(no_grad), grad=torch.tensor(grad))
    assert sum(core.rows) == sum(no_grad) + sum(grad)  # nothing is computed for finished rows
    alone = torch.cat([loop.unroll(e[b : b + 1], no_grad=no_grad[b], grad=grad[b]) for b in range(B)])
    torch.testing.assert_close(together, alone)
    if alone.requires_grad:
        for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), [e, *core.parameters()], allow_unused=True)
                                  for out in (together, alone)), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_callback_sees_all_sequences_after_each_step_of_depths_by_sequence_and_can_stop(e):
    loop, seen = RecurrentDepth(Toy()), []
    depths = {"no_grad": torch.tensor([0, 2, 1, 0, 2]), "grad": torch.tensor([2, 1, 1, 3, 0])}
    loop.unroll(e, **depths, callback=lambda index, state: seen.append((index, state)))
    assert [index for index, _ in seen] == [0, 1, 2, 3, 4]  # two without gradient, three with it
    for index, state in seen:
        for row in range(B):
            n, k = (int(depths[name][row]) for name in ("no_grad", "grad"))
            steps = min(index + 1, n) + min(max(index - 1, 0), k)
            torch.testing.assert_close(state[row : row + 1], by_hand(loop.core, e, steps, row))
    stopped = loop.unroll(e, **depths, callback=lambda index, state: index == 1)
    torch.testing.assert_close(stopped, seen[1][1])


class Pair(nn.Module):
    """A core whose state is two tensors of other shapes than e's."""

    def forward(self, state, e, cond=None):
        return torch.tanh(state[0] + e), state[1] + e.sum(2).sum(1)


def test_a_state_may_be_a_tuple_of_tensors(e):
    loop, start = RecurrentDepth(Pair()), (torch.zeros_like(e), torch.zeros(B))
    depths = torch.tensor([3, 0, 2, 5, 1])
    together = loop.unroll(e, no_grad=0, grad=depths, state=start)
    for row, depth in enumerate(depths.tolist()):
        only = slice(row, row + 1)
        alone = loop.unroll(e[only], no_grad=0, grad=depth, state=tuple(part[only] for part in start))
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[only], theirs)


class Cut(nn.Module):
    def forward(self, state, e, cond=None):
        return state[:, :2]


class Listed(nn.Module):
    def forward(self, state, e, cond=None):
        return [state, None]


@pytest.mark.parametrize(("core", "depths", "why"), [
    (Toy(), {"no_grad": 0, "grad": -3}, "grad -3 is below 0"),
    (Toy(), {"no_grad": -1, "grad": 2}, "no_grad -1 is below 0"),
    (Toy(), {"no_grad": 0, "grad": 1.5}, "grad must be a whole number of 0 or more, got 1.5"),
    (Toy(), {"no_grad": torch.tensor([1, 2]), "grad": 1}, "no_grad must be one whole number or a tensor of 5"),
    (Toy(), {"no_grad": 0, "grad": torch.ones(B)}, "grad must be .* got a float32 tensor"),
    (Toy(), {"no_grad": 0, "grad": torch.tensor([1, 2, -1, 1, 1])}, "the least grad -1 is below 0"),
    (Cut(), {"no_grad": 0, "grad": 2}, r"state of shape \(5, 3, 8\) but returned \(5, 2, 8\)"),
    (Cut(), {"no_grad": 0, "grad": torch.tensor([1] * B)}, r"returned \(5, 2, 8\)"),
    (Listed(), {"no_grad": 0, "grad": 1}, "but returned list"),
])
def test_depths_and_cores_that_cannot_be_are_refused_in_one_sentence(e, core, depths, why, unchecked):
    with pytest.raises(UserError, match=why):
        RecurrentDepth(core).unroll(e, **depths)


def test_a_depth_in_a_tensor_without_axes_is_one_for_all(e):
    core, told = Toy(), []
    loop = RecurrentDepth(core)
    plain = loop.unroll(e, no_grad=2, grad=1)
    found = loop.unroll(e, no_grad=torch.tensor(2), grad=torch.tensor(1), rows=lambda *step: told.append(step))
    assert torch.equal(found, plain)
    assert told == [(0, None), (1, None), (2, None)]


def test_noise_beside_a_state_is_refused(e):
    loop = RecurrentDepth(Toy(), state_init="noise")
    for given in ({"noise": e}, {"state": e}):
        assert loop(e, 2, **given).shape == e.shape
    with pytest.raises(UserError, match="noise= draws the initial state, and state= gives it"):
        loop(e, 2, state=e, noise=e)


def test_a_negative_number_of_steps_is_refused(e):
    with pytest.raises(UserError, match="num_steps -3 is below 0"):
        RecurrentDepth(Toy())(e, -3)


def test_depth_by_sequence_computes_no_more_steps_than_were_drawn(e):
    core = Toy()
    no_grad, grad = torch.tensor([0, 4, 0, 2, 1]), torch.tensor([3, 3, 1, 3, 3])
    RecurrentDepth(core).unroll(e, no_grad=no_grad, grad=grad)
    assert sum(core.rows) == int((no_grad + grad).sum())


def test_depth_by_sequence_needs_a_tied_core(e):
    with pytest.raises(UserError, match="per_sequence"):
        RecurrentDepth(Core(Toy(), Toy())).unroll(e, no_grad=torch.tensor([1] * B), grad=1)


def test_an_untied_core_takes_its_blocks_in_turn(e):
    first, second = Toy(), Toy()
    RecurrentDepth(Core(first, second))(e, num_steps=5)
    assert (len(first.rows), len(second.rows)) == (3, 2)


def test_the_callback_sees_every_state_and_can_stop(e):
    seen = []
    loop = RecurrentDepth(Toy())
    out = loop.unroll(e, no_grad=0, grad=9, callback=lambda index, state: seen.append(state) or index == 2)
    assert len(seen) == 3
    assert out is seen[-1]


def test_like_init_has_huginns_scale_whatever_the_width():
    noise = torch.randn(64, 64, 64, generator=torch.Generator().manual_seed(1))
    state = RecurrentDepth(Toy(), state_init="like-init").initial_state(noise, noise)
    # Closed form: std sqrt(2/5), cut at 3 std; the variance of the cut normal is 1 - 6 phi(3) / (2 Phi(3) - 1).
    assert state.std().item() == pytest.approx((0.4 * (1 - 6 * 0.00443185 / 0.9973002)) ** 0.5, rel=5e-3)
    assert state.abs().max() <= 3 * 0.4**0.5 + 1e-6


@pytest.mark.parametrize("name", STATE_INITS)
def test_random_state_inits_ask_for_their_noise(name, e):
    loop = RecurrentDepth(Toy(), state_init=name, width=D)
    if loop.needs_noise:
        with pytest.raises(UserError, match="noise"):
            loop.initial_state(e)
    else:
        assert loop.initial_state(e).shape == e.shape


@pytest.mark.parametrize("name", INJECTIONS)
def test_injections_mix_state_and_input(name, e):
    torch.manual_seed(0)
    injection = build_injection(name, D)
    state = torch.randn_like(e)
    assert injection(state, e).shape == e.shape
    moved = not torch.equal(injection(state, e), injection(state, e + 1))
    assert moved == (name != "none")
    assert not torch.equal(injection(state, e), injection(state + 1, e))


def test_diagonal_injection_contracts_for_any_parameters_and_starts_at_parcaes_decay():
    injection = Diagonal(D)
    torch.testing.assert_close(injection.decay, torch.full((D,), 0.2**0.5))
    with torch.no_grad():
        injection.log_a.copy_(torch.linspace(-5, 5, D))
        injection.dt_bias.copy_(torch.linspace(5, -5, D))
    assert ((injection.decay > 0) & (injection.decay < 1)).all()


def test_diagonal_injection_starts_as_documented_with_the_draws_of_its_linear_map():
    torch.manual_seed(0)
    injection, after = Diagonal(D), torch.rand(())
    assert torch.equal(injection.mix.weight, torch.eye(D))
    assert not injection.log_a.any()
    torch.manual_seed(0)
    nn.Linear(D, D, bias=False)
    assert torch.rand(()) == after


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'linear'"):
        build_injection("liner", D)
    with pytest.raises(UserError, match="did you mean 'zero'"):
        RecurrentDepth(Toy(), state_init="zeros")
