"""Huginn's depth sampler against its closed-form moments and the published quantiles."""

from typing import get_args

import pytest
import torch

from looped.config.recurrence import RecurrenceConfig
from looped.errors import UserError
from looped.nn.depth_sampling import DISTRIBUTIONS, expected_depths, huginn_depths, sample_depths
from looped.rng import StepRandom, generator

NUM_DRAWS = 20_000


@pytest.fixture(scope="module")
def draws():
    return huginn_depths(32, 8, [generator("depths", i) for i in range(NUM_DRAWS)])


def test_moments_are_those_of_the_mixture(draws):
    n, k = draws
    p = (n + k).double()
    # E[p] = m + 1, Var[p] = m + m^2 (e^(sigma^2) - 1): law of total variance for a Poisson with a log-normal rate.
    sd = (32 + 32**2 * (2.718281828459045**0.25 - 1)) ** 0.5
    assert p.mean().item() == pytest.approx(33.0, abs=4 * sd / NUM_DRAWS**0.5)
    assert p.std().item() == pytest.approx(sd, rel=0.05)
    assert sd == pytest.approx(17.97, abs=0.01)


def test_quantiles_are_huginns(draws):
    n, k = draws
    quantiles = torch.quantile((n + k).double(), torch.tensor([0.05, 0.5, 0.95, 0.99], dtype=torch.float64))
    for ours, published in zip(quantiles.tolist(), [12, 29, 67, 94], strict=True):
        assert ours == pytest.approx(published, abs=max(1, 0.04 * published))


@pytest.mark.parametrize(("mean", "backprop", "n", "k"), [
    (32, 8, 25.04, 7.98), (16, 8, 9.28, 7.73), (8, 4, 5.11, 3.86), (4, 4, 1.60, 3.41)])
def test_expected_depths_match_the_published_means(mean, backprop, n, k):
    ours = expected_depths(mean, backprop)
    # The published pairs are simulated: they sum to mean + 1 only within 0.03.
    assert ours == (pytest.approx(n, abs=0.04), pytest.approx(k, abs=0.01))


def test_expected_depths_match_the_draws(draws):
    n, k = expected_depths(32, 8)
    assert draws[0].double().mean().item() == pytest.approx(n, abs=0.5)
    assert draws[1].double().mean().item() == pytest.approx(k, abs=0.02)


@pytest.mark.parametrize(("quantile", "most"), [(0.5, 29), (0.95, 67), (0.99, 94)])
def test_depths_above_a_quantile_are_drawn_anew_and_the_others_are_kept(draws, quantile, most):
    """The law of the draws that were not above it: same means, and the same numbers where nothing was drawn anew."""
    capped = huginn_depths(32, 8, [generator("depths", i) for i in range(NUM_DRAWS)], quantile)
    p, whole = sum(capped), sum(draws)
    kept = whole <= most
    assert int(p.max()) == most
    assert torch.equal(p[kept], whole[kept])
    for ours, theirs, exact in zip(capped, draws, expected_depths(32, 8, quantile=quantile), strict=True):
        assert ours.double().mean().item() == pytest.approx(exact, rel=0.01)
        assert theirs[kept].double().mean().item() == pytest.approx(exact, rel=0.01)


def test_a_cap_shortens_the_longest_sequence_of_a_batch():
    """Loop steps of a batch of 128: its deepest sequence, means over 100 batches."""
    def longest(quantile):
        batches = [huginn_depths(32, 8, [generator("cap", step, row) for row in range(128)], quantile)
                   for step in range(100)]
        return sum(int(sum(pair).max()) for pair in batches) / 100

    assert longest(1.0) > 100
    assert longest(0.95) < 67


def test_depth_by_sequence_does_not_depend_on_how_rows_are_spread_over_processes():
    whole = sample_depths(8, 4, StepRandom(0, 3, count=8))
    parts = [sample_depths(8, 4, StepRandom(0, 3, start=s, count=4, total=8)) for s in (0, 4)]
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))
    assert len(set((whole[0] + whole[1]).tolist())) > 1


def test_depth_by_batch_is_the_same_on_every_process_and_changes_with_the_step():
    pairs = [sample_depths(8, 4, StepRandom(0, 3, start=s, count=4, total=8), per_sequence=False) for s in (0, 4)]
    assert pairs[0] == pairs[1]
    assert len({sample_depths(8, 4, StepRandom(0, step, count=1), per_sequence=False) for step in range(20)}) > 5


def test_fixed_depth_is_the_mean_with_the_last_steps_in_gradient():
    assert sample_depths(8, 3, StepRandom(0, 0, count=2), distribution="fixed") == (5, 3)
    assert expected_depths(8, 3, distribution="fixed") == (5.0, 3.0)


def test_the_distributions_are_those_of_the_setting():
    assert get_args(RecurrenceConfig.model_fields["distribution"].annotation) == DISTRIBUTIONS


@pytest.mark.parametrize(("mean", "backprop", "distribution", "said"), [
    (0, 4, "huginn", "mean 0 is below 1"), (8, 0, "huginn", "backprop 0 is below 1"),
    (8, 4, "poisson", "depth distribution 'poisson' is unknown; use huginn or fixed or listed")])
def test_depths_that_cannot_be_drawn_are_refused(mean, backprop, distribution, said):
    with pytest.raises(UserError, match=said):
        sample_depths(mean, backprop, StepRandom(0, 0, count=2), distribution=distribution)


SHALLOW = {1: 5, 4: 1}


def test_listed_depths_have_their_shares_in_every_batch():
    """Stratified: of 12 sequences exactly two run four steps, wherever the batch is split; and the means are exact."""
    for step in range(20):
        n, k = sample_depths(4, 3, StepRandom(0, step, count=12), distribution="listed", listed=SHALLOW)
        assert sorted((n + k).tolist()) == [1] * 10 + [4] * 2
        assert torch.equal(n, (n + k == 4).long())
        parts = [sample_depths(4, 3, StepRandom(0, step, start=start, count=6, total=12), distribution="listed",
                               listed=SHALLOW) for start in (0, 6)]
        assert torch.equal(torch.cat([n for n, _ in parts]), n)
    assert expected_depths(4, 3, distribution="listed", listed=SHALLOW) == pytest.approx((1 / 6, 8 / 6))


def test_listed_depths_of_a_batch_are_one_draw_with_these_chances():
    draws = [sample_depths(4, 9, StepRandom(0, step, count=4), distribution="listed", listed=SHALLOW,
                           per_sequence=False) for step in range(600)]
    assert {n for n, _ in draws} == {0}
    share = sum(k == 4 for _, k in draws) / 600
    assert share == pytest.approx(1 / 6, abs=4 * (5 / 36 / 600) ** 0.5)


def test_an_empty_list_of_depths_is_refused():
    with pytest.raises(UserError, match="a listed distribution of depths needs the depths"):
        sample_depths(4, 3, StepRandom(0, 0, count=2), distribution="listed")
