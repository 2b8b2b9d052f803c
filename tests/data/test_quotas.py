"""Turns of the sources of a mixture: counts within one of the shares, in random order, a function of the number."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from looped.data.quotas import Quotas

weights = st.lists(st.integers(1, 400), min_size=1, max_size=6)


def shares_of(weights):
    return [Fraction(weight, sum(weights)) for weight in weights]


@given(weights, st.integers(0, 2**63), st.integers(0, 10**12))
@settings(max_examples=60, deadline=None)
def test_after_each_period_every_source_is_within_one_of_its_share(weights, seed, first):
    shares = shares_of(weights)
    quotas = Quotas(shares)
    first -= first % quotas.period
    sources, items = quotas.turns(np.arange(first, first + 3 * quotas.period), seed)
    before = quotas.before([first])[0]
    for source, share in enumerate(shares):
        mine = items[sources == source]
        assert mine.tolist() == list(range(before[source], before[source] + len(mine)))  # each once, in its order
        for period in range(4):
            last = first + period * quotas.period
            count = before[source] + int((sources[: period * quotas.period] == source).sum())
            assert abs(count - last * share) < 1


def test_weights_of_decimals_are_kept_exactly_over_a_trillion_sequences():
    shares = [Fraction("0.693584"), Fraction("0.306416")]
    assert Quotas(shares).before([10**12])[0].tolist() == [693_584_000_000, 306_416_000_000]


def test_a_single_source_has_every_turn_in_order():
    sources, items = Quotas([Fraction(1)]).turns(np.arange(5, 40), seed=3)
    assert set(sources.tolist()) == {0}
    assert items.tolist() == list(range(5, 40))


def test_the_turns_of_some_rows_are_those_of_all():
    quotas = Quotas(shares_of([5, 3, 1]))
    sources, items = quotas.turns(np.arange(1000), seed=1)
    for rows in (range(17, 23), range(500, 501), range(996, 1000)):
        some = quotas.turns(np.array(rows), seed=1)
        assert np.array_equal(some[0], sources[rows.start : rows.stop])
        assert np.array_equal(some[1], items[rows.start : rows.stop])
    assert not np.array_equal(quotas.turns(np.arange(1000), seed=2)[0], sources)


def test_within_a_period_every_order_is_as_likely():
    """All ten orders of two A and three B over many periods. Control: without the shuffle there is one."""
    quotas = Quotas([Fraction(2, 5), Fraction(3, 5)])
    assert quotas.period == 4
    quotas.period = 5  # a period in which the shares are whole numbers
    sources, _ = quotas.turns(np.arange(5 * 20_000), seed=0)
    orders = Counter(map(tuple, sources.reshape(-1, 5).tolist()))
    assert len(orders) == 10
    assert chi2.sf(sum((count - 2000) ** 2 / 2000 for count in orders.values()), 9) > 1e-4
    quotas._shuffled = lambda periods, seed: np.broadcast_to(np.arange(5), (len(periods), 5))
    assert len(Counter(map(tuple, quotas.turns(np.arange(500), seed=0)[0].reshape(-1, 5).tolist()))) == 1


@pytest.mark.parametrize(("weights", "period"), [([1], 1), ([1, 1], 2), ([7, 3], 4), ([1] * 7, 8), ([9999, 1], 16384)])
def test_a_period_is_as_short_as_gives_every_source_a_turn_on_average(weights, period):
    assert Quotas(shares_of(weights)).period == period
