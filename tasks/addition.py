"""Addition: of two long numbers, and of many short ones."""

import numpy as np

from looped.data.task import Problem, Task, blanks, register
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
    """`a+b+...=` and the `width` digits of the sum. Operands have their least significant digit first, as the text has
    with `reverse`."""
    order = 1 if reverse else -1
    question = [token for number in operands for token in (*(1 + number[::order]), PLUS)]
    return blanks([*question[:-1], EQUALS], 1 + add(operands, width)[::order])


def check_reverse(reverse: bool) -> None:
    if not isinstance(reverse, bool):
        raise UserError(f"task.options.reverse {reverse!r} is neither true (least significant digit first) nor false")


@register
class Addition(Task):
    """`a+b=` and the sum: a and b of n uniform digits each (leading zeros are written), the sum of n + 1.

    reverse: all three numbers are written with the least significant digit first, so that a carry goes the way of the
    text, as the length generalisation literature has it; otherwise most significant first, as people write.
    """

    name = "addition"
    source = "Fan et al. 2024, arXiv 2409.15647; digits reversed as in Zhou et al. 2023, arXiv 2310.16028"
    difficulty = "digits"
    trained = (1, 8)
    tested = (8, 12, 16)
    symbols = (".", *DIGITS, "+", "=")
    causal = "next-token"

    def __init__(self, *, reverse: bool = True) -> None:
        check_reverse(reverse)
        self.reverse = reverse

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        return written(rng.integers(0, 10, (2, difficulty)), difficulty + 1, self.reverse)


@register
class NaryAddition(Task):
    """`a+b+...=` and the sum: n numbers of a few uniform digits each, the sum as wide as the largest one possible.

    That width grows with n (of three digits: 4 up to ten numbers, then 5), since a cell that were always 0 in training
    would teach just that. digits: of each number; 3 in the paper. reverse: as in `addition`; the paper, which trains
    on n = 2, 4, 8, 16, 32, writes the most significant digit first.
    """

    name = "nary-addition"
    source = "Saunshi et al. 2025, Reasoning with latent thoughts, arXiv 2502.17416, section 2.1"
    difficulty = "numbers"
    easiest = 2
    trained = (2, 8)
    tested = (8, 16, 24, 32)
    symbols = (".", *DIGITS, "+", "=")
    causal = "next-token"

    def __init__(self, *, digits: int = 3, reverse: bool = True) -> None:
        if not (isinstance(digits, int) and digits >= 1):
            raise UserError(f"task.options.digits {digits!r} is not a number of digits; make it 1 or more")
        check_reverse(reverse)
        self.digits, self.reverse = digits, reverse

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        operands = rng.integers(0, 10, (difficulty, self.digits))
        return written(operands, len(str(difficulty * (10**self.digits - 1))), self.reverse)
