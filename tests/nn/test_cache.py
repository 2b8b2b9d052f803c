"""A layer's cache: rows written in place are those that `torch.cat` gives, and gradients get tensors of their own."""

import pytest
import torch

import looped.nn.cache
from looped.nn.cache import Cache, LayerCache

B, G, K = 2, 3, 4


@pytest.fixture(autouse=True)
def _large(monkeypatch):
    """As if a few rows were many."""
    monkeypatch.setattr("looped.nn.cache.SMALL", 0)


def rows(num, seed=0):
    return torch.randn(B, num, G, K, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_rows_written_in_place_are_those_of_cat():
    cache, k, v = LayerCache(), rows(0), rows(0)
    for seed, num in enumerate([3, 1, 1, 2, 7, 1, 30, 1]):
        new_k, new_v = rows(num, seed), rows(num, 100 + seed)
        k, v = torch.cat([k, new_k], dim=1), torch.cat([v, new_v], dim=1)
        seen = cache.append(new_k, new_v)
        assert all(torch.equal(a, b) for a, b in zip((*seen, cache.k, cache.v), (k, v, k, v), strict=True))
        if num == 2:
            cache.truncate(5)
            k, v = k[:, :5], v[:, :5]


@torch.no_grad()
def test_a_text_is_copied_a_few_times_in_all(monkeypatch):
    copied, cache = [], LayerCache()
    make = looped.nn.cache._room_for
    monkeypatch.setattr("looped.nn.cache._room_for",
                        lambda own, num: copied.append(own.shape[1]) or make(own, num))
    for number in range(256):
        cache.append(rows(1, number), rows(1, number))
    assert sum(copied) < 2 * 2 * 256
    assert cache.k.untyped_storage().nbytes() <= 2 * cache.k.nbytes + 4 * B * G * K * 4


@torch.no_grad()
def test_the_processor_makes_new_tensors_of_a_few_rows(monkeypatch):
    monkeypatch.setattr("looped.nn.cache.SMALL", 8 * B * G * K)
    cache, places = LayerCache(), []
    for number in range(10):
        places.append(cache.append(rows(1, number), rows(1, number))[0].data_ptr())
    assert len(set(places[:8])) > 1
    assert places[8] == places[9]
    assert torch.equal(cache.k, torch.cat([rows(1, number) for number in range(10)], dim=1))


@torch.no_grad()
def test_rows_that_follow_are_not_added():
    cache = LayerCache()
    for seed in range(3):
        cache.append(rows(2, seed), rows(2, seed))
    before = cache.k.clone()
    for seed in (7, 8):
        k, v = cache.followed_by(rows(3, seed), rows(3, seed + 1))
        assert torch.equal(k, torch.cat([before, rows(3, seed)], dim=1))
        assert torch.equal(v, torch.cat([before, rows(3, seed + 1)], dim=1))
        assert torch.equal(cache.k, before)
    assert torch.equal(cache.append(rows(1), rows(1))[0], torch.cat([before, rows(1)], dim=1))


def test_gradients_pass_through_rows_that_later_ones_follow():
    """An append in place would change what the backward pass has kept."""
    cache, weight = LayerCache(), torch.ones(K, requires_grad=True)
    with torch.no_grad():
        for seed in range(3):
            cache.append(rows(1, seed), rows(1, seed))
    total = 0
    for seed in range(3, 6):
        k, v = cache.append(weight * rows(1, seed), rows(1, seed))
        total = total + (k.square() * v).sum()
    total.backward()
    by_hand = sum((4 - number) * 2 * rows(1, number + 2).pow(3) for number in range(1, 4)).sum((0, 1, 2))
    torch.testing.assert_close(weight.grad, by_hand)


def test_rows_with_a_gradient_are_found_again_without_one():
    cache = LayerCache()
    with torch.no_grad():
        for seed in range(3):
            cache.append(rows(1, seed), rows(1, seed))
    cache.append(rows(1, 3).requires_grad_(), rows(1, 3))
    with torch.no_grad():
        k, _ = cache.append(rows(1, 4), rows(1, 4))
    assert torch.equal(k, torch.cat([rows(1, seed) for seed in range(5)], dim=1))


def test_a_cache_of_inference_mode_may_grow_outside_of_it():
    cache = LayerCache()
    with torch.inference_mode():
        for seed in range(3):
            cache.append(rows(1, seed), rows(1, seed))
    with torch.no_grad():
        k, _ = cache.append(rows(1, 3), rows(1, 3))
    assert torch.equal(k, torch.cat([rows(1, seed) for seed in range(4)], dim=1))


@torch.no_grad()
def test_rows_that_do_not_fit_are_refused_or_widened_as_by_cat():
    cache = LayerCache()
    for seed in range(2):
        cache.append(rows(1, seed), rows(1, seed))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        cache.append(rows(1)[:1], rows(1)[:1])
    assert cache.append(rows(1).double(), rows(1).double())[0].dtype == torch.float64


@torch.no_grad()
def test_a_tree_counts_the_bytes_of_its_rows():
    cache = Cache()
    for seed in range(5):
        cache.child("core", 3).layer(0).append(rows(1, seed), rows(1, seed))
    assert cache.num_bytes() == 2 * 5 * B * G * K * 4
