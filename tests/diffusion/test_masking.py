"""Masked diffusion: schedules and weights in closed form, a bound that is exact for an exact model, draws from p(x)."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from looped.diffusion.masking import SCHEDULES, hide, level, mask_edges, time_of, unmask, weight
from looped.diffusion.noise import block_of
from looped.errors import UserError

PAIRS = torch.tensor([[0.30, 0.05], [0.15, 0.50]], dtype=torch.float64)  # p(first token, second token)
MASK = 2


def times(num=50):
    return torch.linspace(0.01, 0.99, num, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_rise_from_nothing_hidden_to_everything(name):
    m = level(name, torch.linspace(0, 1, 101, dtype=torch.float64))
    assert (m[0].item(), m[-1].item()) == pytest.approx((0, 1), abs=1e-12)
    assert (m.diff() > 0).all()
    torch.testing.assert_close(time_of(name, level(name, times())), times())


def test_weights_are_those_of_the_paper():
    """-alpha'(t) / (1 - alpha(t)): 1/t of the linear schedule; tan(pi (1 - t) / 2) pi / 2 of the cosine one."""
    torch.testing.assert_close(weight("linear", times()), 1 / times())
    torch.testing.assert_close(weight("cosine", times()), math.pi / 2 * torch.tan(math.pi / 2 * (1 - times())))


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_changes_the_bound(name):
    """Of L tokens that a model gives probability q each, L m of them hidden: -L ln q, whatever the schedule."""
    def integrand(t):
        at = torch.tensor([t], dtype=torch.float64)
        return (weight(name, at) * level(name, at)).item() * 7 * -math.log(0.2)

    assert quad(integrand, 0, 1)[0] == pytest.approx(-7 * math.log(0.2), rel=1e-6)


FIRST = torch.cat([PAIRS.T, PAIRS.sum(1)[None]]).log()  # of the first token, by the second or MASK
SECOND = torch.cat([PAIRS, PAIRS.sum(0)[None]]).log()


def exact(tokens, m):
    """Logits of the true conditionals of a pair, given whichever of the two is seen."""
    return torch.stack([FIRST[tokens[:, 1]], SECOND[tokens[:, 0]]], dim=1)


def test_the_bound_of_an_exact_model_is_the_likelihood():
    """The integral over m of (1/m) E[...] in closed form, by enumerating what is hidden."""
    pair = torch.tensor([[1, 0]])

    def integrand(m):
        total = 0.0
        for hidden in ([True, False], [False, True], [True, True]):
            chance = math.prod(m if h else 1 - m for h in hidden)
            losses = -exact(pair.masked_fill(torch.tensor([hidden]), MASK), m).log_softmax(-1)
            total += chance * sum(losses[0, i, pair[0, i]].item() for i in (0, 1) if hidden[i])
        return total / m

    assert quad(integrand, 0, 1)[0] == pytest.approx(-math.log(PAIRS[1, 0].item()), rel=1e-9)


def test_unmasking_with_an_exact_model_draws_from_the_joint():
    num_steps = 64
    num, gen = 20_000, np.random.default_rng(0)
    start = torch.full((num, 2), MASK)
    drawn = unmask(exact, start, start == MASK, torch.linspace(1, 0, num_steps + 1, dtype=torch.float64),
                   uniform=lambda stream, step: torch.from_numpy(gen.random((num, 2))))
    share = torch.zeros(2, 2).index_put((drawn[:, 0], drawn[:, 1]), torch.ones(num), accumulate=True) / num
    # Two tokens shown in one step are drawn apart: once in `num_steps` pairs.
    torch.testing.assert_close(share.double(), PAIRS, rtol=0, atol=4 * 0.5 / num**0.5)


def test_one_step_draws_tokens_apart_from_each_other():
    """Positive control for the test above: the joint needs steps."""
    num, gen = 20_000, np.random.default_rng(0)
    start = torch.full((num, 2), MASK)
    drawn = unmask(exact, start, start == MASK, torch.tensor([1.0, 0.0], dtype=torch.float64),
                   uniform=lambda stream, step: torch.from_numpy(gen.random((num, 2))))
    both = ((drawn[:, 0] == 0) & (drawn[:, 1] == 1)).double().mean().item()
    assert both == pytest.approx(0.35 * 0.55, abs=0.02)
    assert abs(both - PAIRS[0, 1].item()) > 0.1


def test_what_is_seen_stays():
    tokens = torch.tensor([[1, MASK, 0, MASK]])
    filled = unmask(lambda tokens, m: torch.tensor([[[9.0, 0.0]] * 4]), tokens, tokens == MASK,
                    torch.tensor([0.5, 0.0], dtype=torch.float64),
                    uniform=lambda stream, step: torch.full((1, 4), 0.3, dtype=torch.float64))
    assert filled.tolist() == [[1, 0, 0, 0]]


def test_tokens_are_hidden_with_the_probability_of_their_sequence():
    tokens = torch.ones(2, 10_000, dtype=torch.long)
    uniform = torch.rand(2, 10_000, generator=torch.Generator().manual_seed(0))
    shown, hidden = hide(tokens, torch.tensor([0.2, 0.9]), uniform, MASK)
    assert hidden.double().mean(1).tolist() == pytest.approx([0.2, 0.9], abs=0.02)
    assert torch.equal(shown == MASK, hidden)


def test_blocks_share_the_levels_evenly_and_the_first_owns_the_most_hidden():
    edges = mask_edges(4)
    assert edges.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert block_of(torch.tensor([1.0, 0.8, 0.6, 0.3, 0.1, 0.0]), edges).tolist() == [0, 0, 1, 2, 3, 3]
    with pytest.raises(UserError, match="num_blocks 0 is below 1"):
        mask_edges(0)


def test_levels_that_do_not_fall_to_nothing_hidden_are_refused():
    start = torch.full((1, 2), MASK)
    for levels in ([1.0, 0.5], [0.5, 1.0, 0.0], [0.0]):
        with pytest.raises(UserError, match=r"must descend and end in 0; the \d given do not"):
            unmask(exact, start, start == MASK, torch.tensor(levels, dtype=torch.float64),
                   uniform=lambda stream, step: torch.zeros(1, 2).double())
    with pytest.raises(UserError, match="masking schedule 'cosin' is unknown; did you mean 'cosine'"):
        level("cosin", times())
