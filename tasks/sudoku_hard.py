"""Hard 9x9 Sudoku puzzles with one solution, found by hill climbing on their rating.

A puzzle begins as a random board emptied in random order as long as the solution stays unique, so that no given can be
left out. A step of the climb takes a few givens away, gives others until the solution is unique again, leaves out what
is not needed, and keeps the new puzzle if its rating is not lower. `sudoku_search` rates; the rating that is reported
comes from other choices than those that the climb has seen, since the highest of many estimates is too high.

A puzzle has one solution exactly if it gives a cell of every unavoidable set, the cells in which another board differs
from the solution (McGuire, Tugemann, Civario 2012, arXiv 1201.0749). The sets that a search has found are kept, and
answer most of the later questions about the same board.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from looped.data.task import rng_of
from looped.tasks.sudoku_search import CELLS, EVERY, EVERY_CELL, KEPT, backtracks, filled, rating, solutions
from looped.tasks.sudoku_solver import Solver

TAKEN = (1, 2, 3)
"""Numbers of givens that a step takes away, one of them at random."""
ORDERS_IN_CLIMB, ORDERS = 3, 12
"""Choices of the cells to guess per rating: while climbing, and for the rating that is reported."""
PROMISING = 0.6
"""A new puzzle whose first estimate is below this part of the rating reached is not looked at further."""


class Rated(NamedTuple):
    """A puzzle of 81 digits, 0: empty; its one solution; its rating in guesses undone."""

    givens: list[int]
    solution: list[int]
    rating: float


class Board:
    """A filled board, and the unavoidable sets found so far. A puzzle of it is a mask of the cells given."""

    def __init__(self, solution: Sequence[int], rng: Random) -> None:
        self.solution: list[int] = list(solution)
        self._rng, self._right, self._sets = rng, filled(solution), list[int]()
        self._bits = [CELLS * (digit - 1) + cell for cell, digit in enumerate(solution)]

    def givens(self, puzzle: int) -> list[int]:
        return [digit if puzzle >> cell & 1 else 0 for cell, digit in enumerate(self.solution)]

    def _search(self, puzzle: int, barred: int) -> int:
        """The cells in which another board with the same givens differs, without the bits `barred`; 0 if none does."""
        state, settled = EVERY & ~barred, 0
        for cell in cells_of(puzzle):
            state &= KEPT[self._bits[cell]]
            settled |= 1 << self._bits[cell]
        for found in solutions(state, settled, self._rng):
            if found != self._right:
                missed = self._right & ~found
                unavoidable = 0
                for shift in range(0, 9 * CELLS, CELLS):
                    unavoidable |= missed >> shift & EVERY_CELL
                self._sets.append(unavoidable)
                return unavoidable
        return 0

    def differing(self, puzzle: int) -> int:
        """The cells in which another solution of a puzzle differs; 0 if there is none."""
        return next((each for each in self._sets if not each & puzzle), 0) or self._search(puzzle, 0)

    def is_needed(self, puzzle: int, cell: int) -> bool:
        """True if a puzzle with one solution has several without the given in a cell."""
        alone = 1 << cell
        return any(each & puzzle == alone for each in self._sets) or \
            self._search(puzzle ^ alone, 1 << self._bits[cell]) > 0

    def minimal(self, puzzle: int) -> int:
        """A puzzle with one solution without the givens that it does not need, tried in random order."""
        cells = cells_of(puzzle)
        for cell in self._rng.sample(cells, len(cells)):
            if not self.is_needed(puzzle, cell):
                puzzle ^= 1 << cell
        return puzzle

    def neighbour(self, puzzle: int) -> int:
        """Another minimal puzzle, with a few givens exchanged."""
        for cell in self._rng.sample(cells_of(puzzle), self._rng.choice(TAKEN)):
            puzzle ^= 1 << cell
        while differing := self.differing(puzzle):
            puzzle |= 1 << self._rng.choice(cells_of(differing))
        return self.minimal(puzzle)

    def estimate(self, puzzle: int, wanted: float) -> float:
        """The rating while climbing, from a single choice of the cells to guess if that is far below `wanted`."""
        givens = self.givens(puzzle)
        first = backtracks(givens, self.solution, self._rng)
        if first < PROMISING * wanted:
            return first
        rest = ORDERS_IN_CLIMB - 1
        return (first + rest * rating(givens, self.solution, self._rng, rest)) / ORDERS_IN_CLIMB


def cells_of(puzzle: int) -> list[int]:
    """The cells of a mask, ascending."""
    return [cell for cell in range(CELLS) if puzzle >> cell & 1]


def hard_puzzle(seed: int, part: str, index: int, *, steps: int) -> Rated:
    """The puzzle of a seed, a part (`train`, `test`) and an index, after `steps` of the climb; 0: a random minimal
    puzzle."""
    draws = rng_of("hard sudoku", seed, part, index)
    solution = Solver(3, 3).random_board(draws)
    rng = Random(int(draws.integers(2**63)))
    board = Board(solution, rng)
    puzzle = board.minimal(EVERY_CELL)
    reached = board.estimate(puzzle, 0.0)
    for _ in range(steps):
        other = board.neighbour(puzzle)
        found = board.estimate(other, reached)
        if found >= reached:
            puzzle, reached = other, found
    givens = board.givens(puzzle)
    return Rated(givens, solution, rating(givens, solution, rng, ORDERS))
