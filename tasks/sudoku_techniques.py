"""The techniques that a Sudoku needs: which cell follows by which deduction, in which round, and which only by search.

Deductions in the order of human solvers, each tried only where all before it give nothing:

    single    a cell with one candidate (naked), or a digit with one cell in a row, column or box (hidden)
    locked    the candidates of a digit in a box lie in one line, or those of a line in one box: gone elsewhere
    pair      two cells of a unit with the same two candidates (naked), or two digits with the same two cells (hidden)
    search    whatever these leave open
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np

TECHNIQUES = ("single", "locked", "pair", "search")


@dataclass(frozen=True)
class Deduced:
    """The deductions on one board. board: (cells,), 0 where only search goes on. technique: (cells,), index in
    `TECHNIQUES` of the hardest one that had been needed when a cell was filled; -1 for givens. round: (cells,), the
    number of rounds of singles before a cell was filled; -1 for givens, and the last round + 1 where search goes on."""

    board: np.ndarray
    technique: np.ndarray
    round: np.ndarray

    @property
    def hardest(self) -> int:
        """Index in `TECHNIQUES` of the hardest one that the puzzle needs."""
        return int(self.technique.max())


@lru_cache(maxsize=4)
def units_of(box: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(the cells of each row, column and box, (3 size, size); mask of the cells that share a unit, (cells, cells))."""
    height, width = box
    size = height * width
    cells = np.arange(size**2).reshape(size, size)
    boxes = cells.reshape(width, height, height, width).swapaxes(1, 2).reshape(size, size)
    units = np.concatenate([cells, cells.T, boxes])
    peers = np.zeros((size**2, size**2), dtype=bool)
    for unit in units:
        peers[np.ix_(unit, unit)] = True
    np.fill_diagonal(peers, False)
    return units, peers


def deduce(givens: np.ndarray, box: tuple[int, int]) -> Deduced:
    """Everything that follows from `givens` (cells,), 0: empty, on boards with boxes of (rows, columns)."""
    units, peers = units_of(box)
    size, board = units.shape[1], np.array(givens, dtype=int)
    technique, round_ = np.where(board > 0, -1, TECHNIQUES.index("search")), np.where(board > 0, -1, 0)
    candidates = np.ones((len(board), size), dtype=bool)
    for cell in np.flatnonzero(board):
        _place(candidates, peers, cell, board[cell])
    hardest = rounds = 0
    while (board == 0).any():
        found = dict(_singles(candidates, units, board))
        for cell, digit in found.items():
            board[cell], technique[cell], round_[cell] = digit, hardest, rounds
            _place(candidates, peers, cell, digit)
        rounds += bool(found)
        if found:
            continue
        for number, eliminate in ((1, _locked), (2, _pairs)):
            if eliminate(candidates, units, board):
                hardest = max(hardest, number)
                break
        else:
            break
    round_[board == 0] = rounds
    return Deduced(board, technique, round_)


def _place(candidates: np.ndarray, peers: np.ndarray, cell: int, digit: int) -> None:
    candidates[cell] = False
    candidates[peers[cell], digit - 1] = False
    candidates[cell, digit - 1] = True


def _singles(candidates: np.ndarray, units: np.ndarray, board: np.ndarray) -> Iterator[tuple[int, int]]:
    """(cell, digit) of the naked and hidden singles."""
    for cell in np.flatnonzero((board == 0) & (candidates.sum(1) == 1)):
        yield cell, int(candidates[cell].argmax()) + 1
    for unit in units:
        counts = candidates[unit].sum(0)
        for digit in np.flatnonzero(counts == 1):
            cell = unit[candidates[unit, digit].argmax()]
            if board[cell] == 0:
                yield cell, int(digit) + 1


def _locked(candidates: np.ndarray, units: np.ndarray, board: np.ndarray) -> bool:
    """True if locked candidates ruled out others."""
    gone = False
    for one, other in ((a, b) for a in units for b in units if len(set(a) & set(b)) > 1 and a is not b):
        shared, rest, away = np.intersect1d(one, other), np.setdiff1d(one, other), np.setdiff1d(other, one)
        held = candidates[shared].any(0) & ~candidates[rest].any(0)  # of `one`, these digits lie in the shared cells
        out = candidates[away] & held
        candidates[away] &= ~held
        gone |= bool(out.any())
    return gone


def _pairs(candidates: np.ndarray, units: np.ndarray, board: np.ndarray) -> bool:
    """True if naked or hidden pairs ruled out others."""
    gone = False
    for unit in units:
        own = candidates[unit]  # a copy
        own[board[unit] > 0] = False
        for table in (own, own.T):  # cells by digits: naked; digits by cells: hidden
            for a, b in combinations(np.flatnonzero(table.sum(1) == 2), 2):
                if (table[a] == table[b]).all():
                    others = table[a] & np.ones_like(table)
                    others[[a, b]] = False
                    gone |= bool((table & others).any())
                    table &= ~others
        open_ = board[unit] == 0
        candidates[unit[open_]] = own[open_]
    return gone
