"""Hard Sudoku: guesses counted by another search, and puzzles that have one solution and need all of their givens."""

import random
import statistics

import numpy as np
import pytest
from test_sudoku import count_by_sets

from looped.tasks.sudoku_hard import Board, cells_of, hard_puzzle
from looped.tasks.sudoku_search import backtracks, filled, possible, rating, solutions
from looped.tasks.sudoku_solver import Solver

ESCARGOT = "1....7.9..3..2...8..96..5....53..9...1..8...26....4...3......1..4......7..7...3.."
"""Arto Inkala's "AI Escargot" of 2006."""
EASY = "..3.2.6..9..3.5..1..18.64....81.29..7.......8..67.82....26.95..8..2.3..9..5.1.3.."
"""Project Euler 96, grid 1."""


def digits(text):
    return [0 if symbol == "." else int(symbol) for symbol in text]


def solved(text):
    (solution,) = Solver(3, 3).solutions(digits(text))
    return solution


def test_the_search_finds_the_solutions_of_another_solver_and_no_other():
    rng = random.Random(0)
    for text in (ESCARGOT, EASY):
        assert list(solutions(*possible(digits(text)), rng)) == [filled(solved(text))]
    several = [digit if cell != 0 else 0 for cell, digit in enumerate(digits(ESCARGOT))]
    expected = {filled(solution) for solution in Solver(3, 3).solutions(several)}
    assert len(expected) > 1
    assert set(solutions(*possible(several), rng)) == expected


def test_a_puzzle_that_breaks_the_rules_has_no_solution():
    clash = digits(ESCARGOT)
    clash[1] = 1  # beside the 1 in the corner
    assert not list(solutions(*possible(clash), random.Random(0)))


def by_trial(text, rng):
    """The guesses undone of a plain search: singles in cells and units by sets, a random one of the cells with the
    fewest digits left, its digits in random order, until it is solved. No line in common with the module."""
    units = [[9 * r + c for c in range(9)] for r in range(9)] + [[9 * r + c for r in range(9)] for c in range(9)]
    units += [[9 * (r + i) + c + j for i in range(3) for j in range(3)] for r in (0, 3, 6) for c in (0, 3, 6)]
    peers = [{other for unit in units if cell in unit for other in unit} - {cell} for cell in range(81)]

    def put(left, cell, digit):
        left[cell] = {digit}
        for peer in peers[cell]:
            left[peer] = left[peer] - {digit}

    def deduce(left):
        done = set()
        while True:
            if not all(left):
                return None
            naked = [(cell, *left[cell]) for cell in range(81) if len(left[cell]) == 1 and cell not in done]
            hidden = []
            for unit in units:
                for digit in range(1, 10):
                    places = [cell for cell in unit if digit in left[cell]]
                    if not places:
                        return None
                    if len(places) == 1 and places[0] not in done:
                        hidden.append((places[0], digit))
            found = naked or hidden
            if not found:
                return left
            for cell, digit in found:
                if digit not in left[cell]:
                    return None
                put(left, cell, digit)
                done.add(cell)

    undone = 0

    def search(left):
        nonlocal undone
        left = deduce(left)
        if left is None:
            return False
        cells = [cell for cell in range(81) if len(left[cell]) > 1]
        if not cells:
            return True
        fewest = min(len(left[cell]) for cell in cells)
        cell = rng.choice([cell for cell in cells if len(left[cell]) == fewest])
        for digit in rng.sample(sorted(left[cell]), len(left[cell])):
            guess = [set(each) for each in left]
            put(guess, cell, digit)
            if search(guess):
                return True
            undone += 1
        return False

    left = [set(range(1, 10)) for _ in range(81)]
    for cell, digit in enumerate(digits(text)):
        if digit:
            put(left, cell, digit)
    assert search(left)
    return undone


def test_a_puzzle_for_singles_needs_no_guess():
    assert backtracks(digits(EASY), solved(EASY), random.Random(0)) == by_trial(EASY, random.Random(0)) == 0


def test_the_rating_is_the_mean_number_of_guesses_that_a_plain_search_undoes():
    rng = random.Random(1)
    found = hard_puzzle(3, "train", 0, steps=10)
    text = "".join(map(str, found.givens)).replace("0", ".")
    trials = [by_trial(text, rng) for _ in range(60)]
    exact = [backtracks(found.givens, found.solution, rng) for _ in range(60)]
    error = (statistics.variance(trials) / 60 + statistics.variance(exact) / 60) ** 0.5
    assert statistics.mean(exact) > 1
    assert abs(statistics.mean(trials) - statistics.mean(exact)) < 3 * error
    assert statistics.variance(exact) < statistics.variance(trials)  # the order of digits is taken out


@pytest.mark.parametrize("steps", [0, 8])
def test_a_puzzle_has_one_solution_and_loses_it_with_any_given(steps):
    found = hard_puzzle(0, "test", 1, steps=steps)
    givens = np.array(found.givens)
    assert (givens == found.solution)[givens > 0].all()
    assert count_by_sets(givens, (3, 3)) == 1
    for cell in np.flatnonzero(givens)[::4]:
        assert count_by_sets(np.where(np.arange(81) == cell, 0, givens), (3, 3)) == 2
    assert 20 <= (givens > 0).sum() <= 30


def test_an_unavoidable_set_is_where_another_board_differs():
    rng = random.Random(2)
    board = Board(solved(EASY), rng)
    puzzle = sum(1 << cell for cell, digit in enumerate(digits(EASY)) if digit)
    assert board.differing(puzzle) == 0
    fewer = puzzle & ~sum(1 << cell for cell in cells_of(puzzle)[:16])
    differing = board.differing(fewer)
    assert differing
    assert not differing & fewer
    assert board.differing(fewer | differing & -differing) != differing


def test_the_climb_finds_harder_puzzles_and_is_a_function_of_seed_and_index():
    first = [hard_puzzle(0, "train", index, steps=0).rating for index in range(6)]
    climbed = [hard_puzzle(0, "train", index, steps=60) for index in range(6)]
    assert statistics.mean(each.rating for each in climbed) > 2 * statistics.mean(first) > 0
    assert hard_puzzle(0, "train", 2, steps=60) == climbed[2]
    assert hard_puzzle(1, "train", 2, steps=60) != climbed[2] != hard_puzzle(0, "test", 2, steps=60)


def test_ratings_are_the_mean_over_orders():
    rng, again = random.Random(5), random.Random(5)
    one = [backtracks(digits(ESCARGOT), solved(ESCARGOT), again) for _ in range(3)]
    assert rating(digits(ESCARGOT), solved(ESCARGOT), rng, 3) == pytest.approx(statistics.mean(one))
    assert 30 < statistics.mean(one) < 70
