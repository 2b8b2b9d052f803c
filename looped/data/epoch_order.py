"""The order of an epoch: a permutation of `count` items that is a function of (seed, stream, epoch) alone.

Below KEYED items it is the argsort of random draws, an array of 8 bytes per item. From KEYED items on it is computed
for the places that are asked for, in constant memory, by a Feistel network (Black and Rogaway, Ciphers with arbitrary
finite domains, 2002): an item is a pair (left, right) in Z_a x Z_b with a b >= count, each round adds a keyed hash of
one half to the other modulo its size, and a result of `count` or more is put through the network again (cycle walking).

The rule depends on the count alone, so that every run on the same data has the same order.
"""

from collections.abc import Callable
from functools import lru_cache
from math import isqrt

import numpy as np

KEYED = 1 << 22
"""Items from which on the order is computed, not stored. Another value changes the order of data of these sizes."""

ROUNDS = 8


def permuted(places: np.ndarray, count: int, *, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """The items, below `count`, at the given places of an epoch, int64. stream: number of one of several independent
    orders of a seed."""
    if count < KEYED:
        return _stored(seed, stream, count)(epoch)[places]
    return _keyed(places.astype(np.uint64), count, draws(seed, epoch, ROUNDS, stream=stream)).astype(np.int64)


def in_epochs(items: np.ndarray, count: int, *, seed: int, stream: int = 0) -> np.ndarray:
    """The items of an endless sequence of epochs, each the `count` items below `count` in another order, int64."""
    epochs, places = np.divmod(items, count)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = permuted(places[here], count, seed=seed, epoch=epoch, stream=stream)
    return indices


def draws(seed: int, epoch: int, num: int, *, stream: int = 0) -> np.ndarray:
    """Philox's raw draws, a stream that numpy promises never to change, uint64."""
    return np.random.Philox(key=np.array([seed % 2**64, epoch + (stream << 40)], dtype=np.uint64)).random_raw(num)


@lru_cache(maxsize=128)
def _stored(seed: int, stream: int, count: int) -> Callable[[int], np.ndarray]:
    """Epoch -> its stored order; the last two are kept, of each of several streams that take turns."""
    return lru_cache(maxsize=2)(lambda epoch: np.argsort(draws(seed, epoch, count, stream=stream), kind="stable"))


def _keyed(places: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    items = _network(places, count, keys)
    while (outside := items >= count).any():
        items[outside] = _network(items[outside], count, keys)
    return items


def _network(items: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of the numbers below a b, uint64; a and b are about the root of `count`."""
    a = isqrt(count - 1) + 1
    b = -(-count // a)
    left, right = items // np.uint64(b), items % np.uint64(b)
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = (left + hashed(right, first) % np.uint64(a)) % np.uint64(a)
        right = (right + hashed(left, second) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right


def hashed(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014) over values combined with a key, modulo 2^64."""
    mixed = values ^ key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
