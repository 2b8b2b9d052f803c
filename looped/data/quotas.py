"""The source of each training sequence of a mixture, as a function of its number alone.

Sequences come in periods, as short as give every source one on average (a power of two). Before sequence n, the first
of a period, source i has had floor(n W_i) - floor(n W_{i-1}), where W_i is the sum of the shares up to i: less than one
from n w_i, for any number of sources, and in whole numbers that add up to n. Within a period the sources are in random
order.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np

from looped.data.epoch_order import draws, hashed
from looped.tensor_types import Int

STREAM = 1 << 20
"""Number of the order in which sources take turns; those of the sources' own orders count from 0."""


class Quotas:
    """The turns of sources with the given shares, which add up to 1."""

    def __init__(self, shares: Sequence[Fraction]):
        self.ends: list[tuple[int, int]] = [end.as_integer_ratio() for end in accumulate(shares)]
        self.period: int = 1 << (-(-1 // min(shares)) - 1).bit_length()

    def before(self, numbers: Sequence[int]) -> Int[np.ndarray, "numbers sources"]:
        """Number of sequences of each source before each of `numbers`, which are starts of periods."""
        ends = [[number * over // under for over, under in self.ends] for number in numbers]
        return np.diff(np.array(ends, dtype=np.int64), axis=1, prepend=0)

    def turns(self, numbers: Int[np.ndarray, "rows"], seed: int) -> tuple[Int[np.ndarray, "rows"],
                                                                          Int[np.ndarray, "rows"]]:
        """The source of each of the sequences, and which of that source's sequences it is, counted from 0."""
        periods, which = np.unique(numbers // self.period, return_inverse=True)
        starts = (periods * self.period).tolist()
        before, after = self.before(starts), self.before([start + self.period for start in starts])
        order = self._shuffled(periods, seed)  # periods, places
        lasts = np.cumsum(after - before, axis=1)  # periods, sources
        sources = (order[:, :, None] >= lasts[:, None]).sum(2)  # periods, places
        ranks = np.cumsum(sources[:, :, None] == np.arange(len(self.ends)), axis=1)  # periods, places, sources
        found, at = sources[which, numbers % self.period], (which, numbers % self.period)
        return found, before[which, found] + ranks[*at, found] - 1

    def _shuffled(self, periods: Int[np.ndarray, "periods"], seed: int) -> Int[np.ndarray, "periods places"]:
        """A permutation of the places of each period, by the hashes of its numbers."""
        numbers = periods[:, None] * self.period + np.arange(self.period)
        keys = hashed(numbers.astype(np.uint64), draws(seed, 0, 1, stream=STREAM)[0])
        return keys.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
