"""Hard 9x9 Sudoku puzzles with one solution, found by hill climbing on their rating.

A puzzle begins as a random board emptied in random order as long as the solution stays unique, so that no given can be
left out. A step of the climb takes a few givens away, gives others until the solution is unique again, leaves out those
that are not needed, and keeps the new puzzle if its rating is not lower. `sudoku_search` rates; the rating that is
reported comes from other choices than those that the climb has seen, since the highest of many estimates is too high.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from looped.data.task import rng_of
from looped.tasks.sudoku_search import CELLS, filled, other_solution, possible, rating, solutions
from looped.tasks.sudoku_solver import Solver

TAKEN = (1, 2, 3)
"""Numbers of givens that a step takes away, one of them at random."""
ORDERS_IN_CLIMB, ORDERS = 3, 12
"""Choices of the cells to guess per rating: while climbing, and for the rating that is reported."""


class Rated(NamedTuple):
    """A puzzle of 81 digits, 0: empty; its one solution; its rating in guesses undone."""

    givens: list[int]
    solution: list[int]
    rating: float


def is_needed(givens: Sequence[int], cell: int, rng: Random) -> bool:
    """True if a puzzle with one solution has several without the given in a cell."""
    without = list(givens)
    digit, without[cell] = without[cell], 0
    state, settled = possible(without)
    return next(solutions(state & ~(1 << CELLS * (digit - 1) + cell), settled, rng), None) is not None


def minimal(givens: Sequence[int], rng: Random) -> list[int]:
    """A puzzle with one solution, without givens that are not needed: each is left out if possible, in random order."""
    left = list(givens)
    for cell in rng.sample(range(CELLS), CELLS):
        if left[cell] and not is_needed(left, cell, rng):
            left[cell] = 0
    return left


def neighbour(givens: Sequence[int], solution: Sequence[int], rng: Random) -> list[int]:
    """Another minimal puzzle of the same solution, with a few givens exchanged."""
    other = list(givens)
    for cell in rng.sample([cell for cell in range(CELLS) if other[cell]], rng.choice(TAKEN)):
        other[cell] = 0
    right = filled(solution)
    while (wrong := other_solution(other, right, rng)) is not None:
        differing = right & ~wrong
        for _ in range(rng.randrange(differing.bit_count())):
            differing &= differing - 1
        cell = ((differing & -differing).bit_length() - 1) % CELLS
        other[cell] = solution[cell]
    return minimal(other, rng)


def hard_puzzle(seed: int, part: str, index: int, *, steps: int) -> Rated:
    """The puzzle of a seed, a part (`train`, `test`) and an index, after `steps` of the climb; 0: a random minimal
    puzzle."""
    draws = rng_of("hard sudoku", seed, part, index)
    solution = Solver(3, 3).random_board(draws)
    rng = Random(int(draws.integers(2**63)))
    givens = minimal(solution, rng)
    reached = rating(givens, solution, rng, ORDERS_IN_CLIMB) if steps else 0.0
    for _ in range(steps):
        other = neighbour(givens, solution, rng)
        found = rating(other, solution, rng, ORDERS_IN_CLIMB)
        if found >= reached:
            givens, reached = other, found
    return Rated(givens, solution, rating(givens, solution, rng, ORDERS))
