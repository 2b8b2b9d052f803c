"""The order of an epoch: a permutation for any count, keyed by (seed, epoch), and free of cost where data are large."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from looped.data import epoch_order
from looped.data.epoch_order import KEYED, permuted
from looped.data.token_windows import shuffled


def keyed(places, count, seed=0, epoch=0):
    """The computed order, also of counts for which the stored one is used."""
    keys = epoch_order.draws(seed, epoch, epoch_order.ROUNDS)
    return epoch_order._keyed(np.asarray(places, dtype=np.uint64), count, keys).astype(np.int64)


@given(st.one_of(st.integers(1, 300), st.sampled_from([1021, 4096, 4097, 65_535, 65_536, 99_991])),
       st.integers(0, 2**64), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_the_keyed_order_is_a_bijection_for_any_count(count, seed, epoch):
    assert np.array_equal(np.sort(keyed(np.arange(count), count, seed, epoch)), np.arange(count))


@pytest.mark.parametrize("count", [KEYED, KEYED + 1, 4_999_999])
def test_a_whole_epoch_of_large_data_has_each_item_once(count):
    seen = np.zeros(count, dtype=np.uint8)
    items = permuted(np.arange(count), count, seed=3, epoch=1)
    np.add.at(seen, items, 1)
    assert (seen == 1).all()


def chi_square(counts, expected):
    statistic = ((counts - expected) ** 2 / expected).sum()
    return chi2.sf(statistic, counts.size - 1)


def test_every_item_is_as_likely_at_every_place_and_behind_every_other():
    """Over 4,000 seeds: (place, item) and (item, next item) of 16 items in every cell alike. Control: a network of one
    round is told from it."""
    def chances(rounds):
        orders = np.stack([epoch_order._keyed(np.arange(16, dtype=np.uint64), 16, epoch_order.draws(seed, 0, rounds))
                           for seed in range(4000)]).astype(int)
        places, pairs = np.zeros((16, 16)), np.zeros((16, 16))
        for row in orders:
            places[np.arange(16), row] += 1
            pairs[row[:-1], row[1:]] += 1
        off = pairs[~np.eye(16, dtype=bool)]
        return chi_square(places, 250), chi_square(off, off.mean())
    assert min(chances(epoch_order.ROUNDS)) > 1e-4
    assert min(chances(2)) < 1e-12


def test_items_of_large_data_are_spread_evenly_over_an_epoch():
    count, bins = 10**9, 64
    places = np.arange(200_000) * (count // 200_000)
    items = keyed(places, count)
    table, *_ = np.histogram2d(places * bins // count, items * bins // count, bins=bins, range=[[0, bins]] * 2)
    assert chi_square(table, len(places) / bins**2) > 1e-4
    near = keyed(np.arange(200_000), count)  # neighbouring places lead to items far apart
    assert chi_square(np.histogram(np.diff(near) % count, bins=bins, range=(0, count))[0], 199_999 / bins) > 1e-4


def test_small_data_keep_the_stored_order_and_large_data_have_the_recorded_one():
    draws = np.random.Philox(key=np.array([5, 2], dtype=np.uint64)).random_raw(KEYED - 1)
    expected = np.argsort(draws, kind="stable")[[0, 1, KEYED - 2]]
    assert permuted(np.array([0, 1, KEYED - 2]), KEYED - 1, seed=5, epoch=2).tolist() == expected.tolist()
    assert permuted(np.arange(4), KEYED, seed=5, epoch=2).tolist() == RECORDED[KEYED]
    assert permuted(np.arange(4), 10**9 + 7, seed=0, epoch=0).tolist() == RECORDED[10**9 + 7]


RECORDED = {KEYED: [3117256, 215406, 3029886, 775036],
            10**9 + 7: [477791874, 357657973, 763330485, 403690043]}


def test_large_data_are_shuffled_by_seed_and_step_alone():
    count = 10**9
    late = shuffled(count, 17, batch_size=64, seed=1)
    for step in (3, 16, 99):
        shuffled(count, step, batch_size=64, seed=1)
    assert np.array_equal(shuffled(count, 17, batch_size=64, seed=1), late)
    assert np.array_equal(shuffled(count, 17, batch_size=64, seed=1, rows=range(8, 16)), late[8:16])
    assert not np.array_equal(shuffled(count, 17, batch_size=64, seed=2), late)
    first, second = (shuffled(count, epoch * (count // 64), batch_size=64, seed=1) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    assert np.array_equal(shuffled(count, count // 64, batch_size=64, seed=1), second)


def test_a_billion_items_cost_no_memory():
    code = ("import resource\nfrom looped.data.token_windows import shuffled\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "for step in range(200): shuffled(10**9, step * 10**6, batch_size=64, seed=0)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(said) < 8 << 10  # KiB; the stored order would take 8 GB
