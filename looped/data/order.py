"""The order of an epoch: a permutation of `count` items that is a function of (seed, epoch) alone.

Below KEYED items it is the argsort of random draws, an array of 8 bytes per item. From KEYED items on it is computed
for the places that are asked for, in constant memory, by a Feistel network (Black and Rogaway, Ciphers with arbitrary
finite domains, 2002): an item is a pair (left, right) in Z_a x Z_b with a b >= count, each round adds a keyed hash of
one half to the other modulo its size, and a result of `count` or more is put through the network again (cycle walking).

The rule depends on the count alone, so that every run on the same data has the same order.
"""

from functools import lru_cache
from math import isqrt

import numpy as np

KEYED = 1 << 22
"""Items from which on the order is computed, not stored. Another value changes the order of data of these sizes."""

ROUNDS = 8


def permuted(places: np.ndarray, count: int, *, seed: int, epoch: int) -> np.ndarray:
    """The items, below `count`, at the given places of an epoch, int64."""
    if count < KEYED:
        return _sorted(seed, epoch, count)[places]
    return _keyed(places.astype(np.uint64), count, _draws(seed, epoch, ROUNDS)).astype(np.int64)


def _draws(seed: int, epoch: int, num: int) -> np.ndarray:
    """Philox's raw draws, a stream that numpy promises never to change, uint64."""
    return np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(num)


@lru_cache(maxsize=2)
def _sorted(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.argsort(_draws(seed, epoch, count), kind="stable")


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
        left = (left + _hash(right, first) % np.uint64(a)) % np.uint64(a)
        right = (right + _hash(left, second) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014) over values combined with a key, modulo 2^64."""
    mixed = values ^ key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
