"""Difficulties of the puzzles of a file: the rows of each, in training and held out."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from looped.data.task import BLANK
from looped.errors import UserError
from looped.tasks.puzzle_files import Puzzles


class Levels(Protocol):
    """The difficulties of (training, held-out) puzzles; `difficulty`, `easiest`, `trained` and `tested` are those of a
    `Task`."""

    difficulty: str
    easiest: int
    trained: tuple[int, int]
    tested: tuple[int, ...]

    def rows(self, difficulty: int, heldout: bool) -> np.ndarray:
        """The rows (N,) of the puzzles of a difficulty, N > 0. Raises UserError for a difficulty without puzzles."""
        ...


class ByEmptyCells:
    """Puzzles with at most as many empty cells as the difficulty says."""

    difficulty = "empty cells at most"

    def __init__(self, parts: tuple[Puzzles, Puzzles]) -> None:
        counts = [(part.questions == BLANK).sum(axis=1) for part in parts]
        self._rows = [np.argsort(count, kind="stable") for count in counts]  # most givens first
        self._counts = [count[rows] for count, rows in zip(counts, self._rows, strict=True)]
        self.easiest: int = int(max(count[0] for count in self._counts))
        hardest, hardest_heldout = (int(count[-1]) for count in self._counts)
        self.trained: tuple[int, int] = (hardest, hardest)
        self.tested: tuple[int, ...] = (hardest_heldout,)

    def rows(self, difficulty: int, heldout: bool) -> np.ndarray:
        return self._rows[heldout][:np.searchsorted(self._counts[heldout], difficulty, side="right")]


class OneLevel:
    """All puzzles have one difficulty, `level`, which counts `difficulty`; `all_have` begins the message of another."""

    def __init__(self, parts: tuple[Puzzles, Puzzles], level: int, difficulty: str, all_have: str) -> None:
        self.difficulty: str = difficulty
        self.easiest: int = level
        self.trained: tuple[int, int] = (level, level)
        self.tested: tuple[int, ...] = (level,)
        self._rows, self._all_have = [np.arange(len(part.questions)) for part in parts], all_have

    def rows(self, difficulty: int, heldout: bool) -> np.ndarray:
        if difficulty != self.easiest:
            raise UserError(f"{self._all_have} {self.easiest}, got difficulty {difficulty}; take {self.easiest}")
        return self._rows[heldout]


class ByRating:
    """Bands of the rating: difficulty 0 has all puzzles, k those of the k-th band.

    edges: the lowest ratings of all bands but the first, ascending: (10, 30) makes the bands below 10, from 10 to below
    30, and from 30. Training is on all puzzles; evaluations are of all held-out ones and of each band that has any.
    Raises UserError for edges that are not ascending numbers, and for ratings that are none.
    """

    easiest = 0
    trained = (0, 0)

    def __init__(self, parts: tuple[Puzzles, Puzzles], edges: Sequence[float], path: str) -> None:
        check_edges(edges)
        for part in parts:
            if (unknown := np.isnan(part.ratings)).any():
                raise UserError(f"task.options.rating_bands needs a number in the column rating, and {unknown.sum()} "
                                f"of {len(unknown)} rows of {path} have none; add it, or leave rating_bands out")
        whole = [np.arange(len(part.ratings)) for part in parts]
        bands = [np.searchsorted(edges, part.ratings, side="right") for part in parts]
        self._rows = [[rows, *(rows[band == k] for k in range(len(edges) + 1))]
                      for rows, band in zip(whole, bands, strict=True)]
        self.tested: tuple[int, ...] = tuple(k for k, rows in enumerate(self._rows[True]) if len(rows))
        between = [f"{low:g} to below {high:g}" for low, high in pairwise(edges)]
        self._names = ["all", f"below {edges[0]:g}", *between, f"from {edges[-1]:g}"]
        self.difficulty: str = f"rating band ({', '.join(f'{k}: {name}' for k, name in enumerate(self._names))})"

    def rows(self, difficulty: int, heldout: bool) -> np.ndarray:
        rows = self._rows[heldout][difficulty] if difficulty < len(self._names) else ()
        if not len(rows):
            part = "held-out" if heldout else "training"
            raise UserError(f"the {part} part has no puzzle of rating band {difficulty}; take one of "
                            f"{', '.join(map(str, self.tested))}")
        return rows


def check_edges(edges: Sequence[float]) -> None:
    """Raises UserError unless `rating_bands` are ascending numbers."""
    numbers = isinstance(edges, list | tuple) and len(edges) > 0 and all(
        isinstance(edge, int | float) and not isinstance(edge, bool) for edge in edges)
    if not numbers or any(low >= high for low, high in pairwise(edges)):
        raise UserError(f"task.options.rating_bands {edges!r} are not ascending numbers; write the lowest ratings of "
                        f"all bands but the first, as [10, 30, 100]")
