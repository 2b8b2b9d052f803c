"""Copy: repeat a sequence of letters."""

from string import ascii_lowercase

import numpy as np

from looped.data.task import Problem, Task, blanks, check_columns, register
from looped.errors import UserError


@register
class Copy(Task):
    """n uniform letters, the separator `|`, and n answer cells: the same letters in the same order.

    alphabet: number of letters, 2 to 26. Letters repeat, so that a copy by "what followed this letter" fails. columns:
    under task.layout full, a letter and its copy share one column (position coupling, Cho et al. 2024, arXiv
    2405.20671).
    """

    name = "copy"
    source = "Fan et al. 2024, Looped transformers for length generalization, arXiv 2409.15647"
    difficulty = "letters"
    trained = (1, 20)
    tested = (20, 30, 40)
    causal = "next-token"

    def __init__(self, *, alphabet: int = 10, columns: bool = False) -> None:
        if not (isinstance(alphabet, int) and 2 <= alphabet <= len(ascii_lowercase)):
            raise UserError(f"task.options.alphabet {alphabet!r} is not a number of letters from 2 to 26")
        check_columns(columns)
        self.alphabet, self.columns = alphabet, columns
        self.symbols = (".", "|", *ascii_lowercase[:alphabet])

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        letters = 2 + rng.integers(0, self.alphabet, difficulty)
        return blanks([*letters, 1], letters)

    def coordinates(self, length: int) -> np.ndarray:
        wide = length // 2 + 1  # the letters and the separator
        return np.stack(np.divmod(np.arange(length), wide), axis=1) if self.columns else super().coordinates(length)
