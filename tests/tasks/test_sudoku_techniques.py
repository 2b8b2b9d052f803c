"""Deductions on Sudoku boards: always right, each class of them needed where it is named, and known puzzles."""

import numpy as np
import pytest

from looped.data.task import find_task, rng_of
from looped.tasks.sudoku import BOXES
from looped.tasks.sudoku_hard import hard_puzzle
from looped.tasks.sudoku_solver import Solver
from looped.tasks.sudoku_techniques import TECHNIQUES, deduce, units_of

EASY = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
"""Wikipedia's example, "Sudoku": singles are enough."""
HARD = "800000000003600000070090200050007000000045700000100030001000068008500010090000400"
"""Inkala's puzzle of 2012: no deduction of these gives a digit."""


def board(text):
    return np.array([int(digit) for digit in text])


def test_puzzles_of_known_difficulty():
    easy, hard = deduce(board(EASY), (3, 3)), deduce(board(HARD), (3, 3))
    assert TECHNIQUES[easy.hardest] == "single"
    assert (easy.board > 0).all()
    assert TECHNIQUES[hard.hardest] == "search"
    assert (hard.board == board(HARD)).all()


@pytest.mark.parametrize("size", [4, 6, 9])
def test_every_deduction_is_right_and_stops_where_search_begins(size):
    task, seen = find_task("sudoku", {"size": size, "unique": True}), set()
    for number in range(40 if size == 9 else 20):
        problem = task.problem(0, number, task.trained[1], heldout=False)
        found = deduce(problem.inputs, BOXES[size])
        filled = found.board > 0
        assert (found.board == problem.targets)[filled].all()
        assert ((found.technique == TECHNIQUES.index("search")) == ~filled).all()
        assert ((found.technique == -1) == (problem.inputs > 0)).all()
        assert ((found.round == -1) == (problem.inputs > 0)).all()
        seen.add(TECHNIQUES[found.hardest])
    assert "single" in seen


def test_rated_puzzles_need_search_and_what_is_deduced_of_them_is_right():
    for number in range(4):
        rated = hard_puzzle(0, "train", number, steps=20)
        found = deduce(np.array(rated.givens), (3, 3))
        filled = found.board > 0
        assert (found.board == np.array(rated.solution))[filled].all()
    assert "search" in {TECHNIQUES[deduce(np.array(hard_puzzle(0, "train", n, steps=20).givens), (3, 3)).hardest]
                        for n in range(4)}


def test_locked_candidates_and_pairs_are_needed_by_some_puzzles_and_right():
    """Minimal random puzzles: each class occurs, and no elimination ever loses the solution."""
    solver, rng, seen = Solver(3, 3), rng_of("techniques"), set()
    for _ in range(40):
        full = np.array(solver.random_board(rng))
        open_ = np.array(solver.removable(full.tolist(), rng))
        found = deduce(np.where(open_, 0, full), (3, 3))
        assert (found.board == full)[found.board > 0].all()
        seen.add(TECHNIQUES[found.hardest])
    assert {"single", "locked", "search"} <= seen


def test_a_cell_with_one_candidate_is_of_round_0_and_what_follows_from_it_later():
    full = board("534678912672195348198342567859761423426853791713924856961537284287419635345286179")
    one = full.copy()
    one[[0, 40, 80]] = 0
    assert (deduce(one, (3, 3)).round[[0, 40, 80]] == 0).all()
    easy = deduce(board(EASY), (3, 3))
    assert easy.round.max() > 2
    units, peers = units_of((3, 3))
    assert peers.sum(1).tolist() == [20] * 81
    assert units.shape == (27, 9)
