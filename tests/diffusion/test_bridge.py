"""Each bridge against its definition on a small table."""

import pytest
import torch

from looped.diffusion.clean_estimate import bridge, draw
from looped.errors import UserError

TABLE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
LOGITS = torch.log(torch.tensor([[[0.5, 0.3, 0.2]]]))


def uniform(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_soft_is_the_expectation():
    torch.testing.assert_close(bridge("soft", LOGITS, TABLE), torch.tensor([[[0.3, 0.3]]]))


def test_hard_is_the_likeliest_row():
    torch.testing.assert_close(bridge("hard", LOGITS, TABLE), torch.tensor([[[1.0, 0.0]]]))


def test_top_k_is_the_expectation_over_the_likeliest_rows():
    torch.testing.assert_close(bridge("top-k", LOGITS, TABLE, top_k=2), torch.tensor([[[0.625, 0.375]]]))
    torch.testing.assert_close(bridge("top-k", LOGITS, TABLE, top_k=9), bridge("soft", LOGITS, TABLE))


def test_sampled_rows_come_with_their_probabilities():
    rows = bridge("sampled", LOGITS.expand(4000, 1, 3), TABLE, uniform=uniform(4000, 1))
    shares = torch.stack([(rows == row).all(-1).float().mean() for row in TABLE])
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=4 * 0.5 / 4000**0.5, rtol=0)


def test_a_low_temperature_turns_soft_into_hard_and_a_high_one_into_the_mean():
    torch.testing.assert_close(bridge("soft", LOGITS, TABLE, temperature=1e-3), bridge("hard", LOGITS, TABLE))
    torch.testing.assert_close(bridge("soft", LOGITS, TABLE, temperature=1e6)[0, 0], TABLE.mean(0), atol=1e-4, rtol=0)


def test_half_precision_logits_are_read_in_float32():
    low = LOGITS.bfloat16()
    torch.testing.assert_close(bridge("soft", low, TABLE), bridge("soft", low.float(), TABLE))


@pytest.mark.parametrize(("kind", "options", "why"), [
    ("sofd", {}, "did you mean 'soft'"), ("soft", {"temperature": 0.0}, "not positive"), ("sampled", {}, "uniform")])
def test_bad_arguments_are_named(kind, options, why):
    with pytest.raises(UserError, match=why):
        bridge(kind, LOGITS, TABLE, **options)


@pytest.mark.parametrize("kind", ["soft", "hard", "top-k", "sampled"])
def test_autocast_does_not_lower_the_precision(kind):
    logits = 4 * torch.randn(3, 5, 300, generator=torch.Generator().manual_seed(0))
    table = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    exact = bridge(kind, logits, table, uniform=uniform(3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = bridge(kind, logits, table, uniform=uniform(3, 5))
        crude = logits.softmax(-1) @ table
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=1e-6, atol=1e-6)
    assert crude.dtype == torch.bfloat16  # positive control: a plain product would have been lowered


def test_a_single_position_can_be_sampled():
    assert bridge("sampled", LOGITS[0, 0], TABLE, uniform=uniform()).shape == (2,)


def test_draws_are_the_inverse_of_the_cumulative_probability():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    places = torch.tensor([0.0, 0.2499, 0.25, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(probs.expand(5, 5), places).tolist() == [1, 1, 3, 3, 3]  # tokens of probability 0 are never drawn
