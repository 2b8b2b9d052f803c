"""Division of an evaluation over the batches of its data: by one process, or by several that share the results."""

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")
S = TypeVar("S", bound=Sized)
R = TypeVar("R")


class Workers:
    """The processes that measure together: this one alone."""

    def over(self, batches: Iterable[T], measure: Callable[[T], R]) -> list[R]:
        """`measure(batch)` of every batch, in their order."""
        return [measure(batch) for batch in batches]

    def batch_size(self, most: int, num_rows: int) -> int:
        """The size of the batches of so many rows that are measured one by one, at most `most`."""
        return most


ALONE = Workers()


class SeveralWorkers(Workers):
    """Process `rank` of `num`, which measures every num-th batch and gets the results of all. Sums in the order of the
    batches are those of one process to the last bit, unless it takes smaller batches to have one for each process; then
    results of rows differ by rounding.

    together: runs a function on every process and returns the results of all by rank, on each. Results are numbers and
    tensors on the host.
    """

    def __init__(self, rank: int, num: int, together: Callable[[Callable[[], Any]], list[Any]]):
        self.rank = rank
        self.num = num
        self.together = together

    def over(self, batches: Iterable[T], measure: Callable[[T], R]) -> list[R]:
        parts = self.together(lambda: [measure(batch) for batch in islice(batches, self.rank, None, self.num)])
        return [parts[each % self.num][each // self.num] for each in range(sum(map(len, parts)))]

    def batch_size(self, most: int, num_rows: int) -> int:
        return min(most, max(1, math.ceil(num_rows / self.num)))


def placed(batches: Iterable[S]) -> Iterator[tuple[int, S]]:
    """(index of its first row among all, batch) of every batch."""
    first = 0
    for batch in batches:
        yield first, batch
        first += len(batch)
