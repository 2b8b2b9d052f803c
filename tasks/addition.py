"""Addition of two long numbers, and of many short ones."""

from itertools import count

import numpy as np

from looped.data.task import Problem, Task, blanks, check_columns, register
from looped.errors import UserError

DIGITS = tuple("0123456789")
PLUS, EQUALS = 11, 12  # after the blank and the ten digits


def add(operands: np.ndarray, width: int) -> np.ndarray:
    """The sum of numbers, by columns with a carry: (N, digits) -> (width,), least significant digit first."""
    columns = np.zeros(width, dtype=np.int64)
    columns[: operands.shape[1]] = operands.sum(axis=0)
    for place in range(width - 1):
        columns[place + 1] += columns[place] // 10
    return columns % 10


def written(operands: np.ndarray, width: int, reverse: bool) -> Problem:
    """`a+b+...=` and the `width` digits of the sum. Operands come with the least significant digit first; the text is
    written so only with `reverse`."""
    order = 1 if reverse else -1
    question = [token for number in operands for token in (*(1 + number[::order]), PLUS)]
    return blanks([*question[:-1], EQUALS], 1 + add(operands, width)[::order])


def in_columns(digits: int, numbers: int, width: int, reverse: bool) -> np.ndarray:
    """(row, place) of every cell of `written`, as on paper: one number per row, digits of equal significance in one
    column.

    This is position coupling (Cho et al. 2024, arXiv 2405.20671). The signs mark both ends: `+` stands before the least
    significant column, into which nothing is carried, `=` after the last one of the sum.
    """
    order = 1 if reverse else -1
    rows = [(row, place) for row in range(numbers) for place in (*np.arange(digits)[::order], -1)]
    rows[-1] = (numbers - 1, width)
    return np.array([*rows, *((numbers, place) for place in np.arange(width)[::order])])


def check_reverse(reverse: bool) -> None:
    if not isinstance(reverse, bool):
        raise UserError(f"task.options.reverse {reverse!r} is neither true (least significant digit first) nor false")


@register
class Addition(Task):
    """`a+b=` and the sum: a and b of n uniform digits each (leading zeros are written), the sum of n + 1.

    reverse: all three numbers are written least significant digit first, so that carries run in reading order, as in
    the literature on length generalisation; otherwise most significant first, as people write. columns: under
    task.layout full, a digit's position is the column of its significance (`in_columns`), not its place in the text.
    """

    name = "addition"
    source = "Fan et al. 2024, arXiv 2409.15647; digits reversed as in Zhou et al. 2023, arXiv 2310.16028"
    difficulty = "digits"
    trained = (1, 8)
    tested = (8, 12, 16)
    symbols = (".", *DIGITS, "+", "=")
    causal = "next-token"

    def __init__(self, *, reverse: bool = True, columns: bool = False) -> None:
        check_reverse(reverse)
        check_columns(columns)
        self.reverse, self.columns = reverse, columns

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        return written(rng.integers(0, 10, (2, difficulty)), difficulty + 1, self.reverse)

    def coordinates(self, length: int) -> np.ndarray:
        digits = length // 3 - 1  # of 3 * digits + 3 cells
        return in_columns(digits, 2, digits + 1, self.reverse) if self.columns else super().coordinates(length)


@register
class NaryAddition(Task):
    """`a+b+...=` and the sum: n numbers of a few uniform digits each, the sum as wide as the largest one possible.

    The width grows with n (for three digits: 4 up to ten numbers, then 5), since from a cell that is always 0 in
    training a model would learn only that. digits: per number; 3 in the paper. reverse: as in `addition`; the paper,
    which trains on n = 2, 4, 8, 16, 32, writes the most significant digit first. columns: as in `addition`.
    """

    name = "nary-addition"
    source = "Saunshi et al. 2025, Reasoning with latent thoughts, arXiv 2502.17416, section 2.1"
    difficulty = "numbers"
    easiest = 2
    trained = (2, 8)
    tested = (8, 16, 24, 32)
    symbols = (".", *DIGITS, "+", "=")
    causal = "next-token"

    def __init__(self, *, digits: int = 3, reverse: bool = True, columns: bool = False) -> None:
        if not (isinstance(digits, int) and digits >= 1):
            raise UserError(f"task.options.digits {digits!r} is not a number of digits; make it 1 or more")
        check_reverse(reverse)
        check_columns(columns)
        self.digits, self.reverse, self.columns = digits, reverse, columns

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        return written(rng.integers(0, 10, (difficulty, self.digits)), self._width(difficulty), self.reverse)

    def _width(self, numbers: int) -> int:
        """Digits of the largest sum."""
        return len(str(numbers * (10**self.digits - 1)))

    def coordinates(self, length: int) -> np.ndarray:
        if not self.columns:
            return super().coordinates(length)
        numbers = next(n for n in count(self.easiest) if n * (self.digits + 1) + self._width(n) == length)
        return in_columns(self.digits, numbers, self._width(numbers), self.reverse)
