"""Sudoku against counts that are published and a solver that is written another way; files of puzzles."""

import itertools
import os

import numpy as np
import pytest
from puzzle_helpers import as_text, fingerprint, write_csv

from looped.config.data import TaskConfig
from looped.data.task import find_task
from looped.data.task_data import prepare_task
from looped.errors import UserError
from looped.tasks.puzzle_files import is_heldout
from looped.tasks.sudoku import BOXES, board_stock, is_valid, vary
from looped.tasks.sudoku_solver import Solver


def count_by_sets(board, box, limit=2):
    """The number of solutions, up to a limit, by crossing out candidates in sets: no line in common with the solver."""
    height, width = box
    size = height * width

    def together(a, b):
        (r, c), (s, d) = divmod(a, size), divmod(b, size)
        return a != b and (r == s or c == d or (r // height, c // width) == (s // height, d // width))

    peers = [[other for other in range(size**2) if together(cell, other)] for cell in range(size**2)]

    def place(left, cell, digit):
        left = {key: set(value) for key, value in left.items()}
        left[cell] = {digit}
        todo = [cell]
        while todo:
            one = todo.pop()
            (known,) = left[one]
            for peer in peers[one]:
                if known in left[peer]:
                    left[peer].discard(known)
                    if not left[peer]:
                        return None
                    if len(left[peer]) == 1:
                        todo.append(peer)
        return left

    def count(left, limit):
        if left is None:
            return 0
        open_cells = [cell for cell, digits in left.items() if len(digits) > 1]
        if not open_cells:
            return 1
        cell = min(open_cells, key=lambda key: len(left[key]))
        found = 0
        for digit in left[cell]:
            found += count(place(left, cell, digit), limit - found)
            if found >= limit:
                break
        return found

    left = {cell: set(range(1, size + 1)) for cell in range(size**2)}
    for cell, digit in enumerate(board):
        if digit and left is not None:
            left = place(left, cell, int(digit)) if digit in left[cell] else None
    return count(left, limit)


@pytest.fixture(scope="module")
def boards_4x4():
    """All of them, as rows that are permutations, put together and looked at."""
    rows = list(itertools.permutations(range(1, 5)))
    found = []
    for board in itertools.product(rows, repeat=4):
        boxes = [{board[r][c], board[r][c + 1], board[r + 1][c], board[r + 1][c + 1]} for r in (0, 2) for c in (0, 2)]
        if all(len(set(column)) == 4 for column in zip(*board, strict=True)) and all(len(box) == 4 for box in boxes):
            found.append(tuple(itertools.chain(*board)))
    return set(found)


def test_the_solver_finds_the_288_boards_of_4x4_and_no_other(boards_4x4):
    found = [tuple(board) for board in Solver(2, 2).solutions([0] * 16)]
    assert len(boards_4x4) == len(found) == 288
    assert set(found) == boards_4x4


def test_the_solver_counts_the_28200960_boards_of_6x6():
    """Digits renamed, and columns of a box swapped, the first two rows begin 123456, 456: one in 6! * 3! does."""
    board = [1, 2, 3, 4, 5, 6, 4, 5, 6] + [0] * 27
    assert sum(1 for _ in Solver(2, 3).solutions(board)) * 720 * 6 == 28_200_960


def test_the_solver_solves_a_board_only_where_there_is_a_solution(boards_4x4):
    rng = np.random.default_rng(0)
    for _ in range(50):
        board = np.where(rng.random(16) < 0.4, rng.integers(1, 5, 16), 0)
        fits = [full for full in boards_4x4 if (board == full)[board > 0].all()]
        assert sorted(map(tuple, Solver(2, 2).solutions(board.tolist()))) == sorted(fits)
        assert count_by_sets(board, (2, 2), limit=1000) == len(fits)


def test_a_random_board_is_valid_in_every_size():
    rng = np.random.default_rng(1)
    for box in BOXES.values():
        assert is_valid(np.array([Solver(*box).random_board(rng) for _ in range(5)]), box).all()


@pytest.mark.parametrize("size", BOXES)
def test_symmetries_keep_boards_valid_and_carry_what_belongs_to_a_cell(size):
    stock, _ = board_stock(size, False, False)
    rng = np.random.default_rng(2)
    for base in stock[:40]:
        board, digits = vary(np.stack([base[0], base[0]]), BOXES[size], rng)
        assert is_valid(board.reshape(1, -1), BOXES[size]).all()
        renamed = {(int(a), int(b)) for a, b in zip(board.ravel(), digits.ravel(), strict=True)}
        assert len(renamed) == size  # one name a digit: both went the same way


def test_a_board_that_is_no_symmetry_is_seen_as_invalid():
    board = board_stock(6, False, False)[0][0, 0]
    assert is_valid(board.reshape(1, -1), (2, 3)).all()
    assert not is_valid(board[[0, 2, 1, 3, 4, 5]].reshape(1, -1), (2, 3)).any()  # rows across bands


def test_every_board_of_4x4_is_drawn(boards_4x4):
    task = find_task("sudoku")
    drawn = {tuple(task.problem(0, index, 10).targets.tolist()) for index in range(3000)}
    assert drawn == boards_4x4


@pytest.mark.parametrize(("size", "unique"), [(4, False), (4, True), (6, False), (6, True), (9, False)])
def test_a_puzzle_has_as_many_empty_cells_as_asked_and_its_target_is_right(size, unique):
    task = find_task("sudoku", {"size": size, "unique": unique})
    levels = {*task.trained, *task.tested}
    for level, index, heldout in itertools.product(levels, range(5), (False, True)):
        problem = task.problem(3, index, level, heldout=heldout)
        assert (problem.inputs == 0).sum() == problem.scored.sum() == level
        assert (problem.inputs == problem.targets)[~problem.scored].all()
        assert task.is_right(problem, problem.targets)


@pytest.mark.parametrize(("size", "level"), [(4, 11), (6, 25)])
def test_unique_puzzles_have_one_solution_and_others_often_more(size, level):
    counts = {}
    for unique in (True, False):
        task = find_task("sudoku", {"size": size, "unique": unique})
        puzzles = [task.problem(0, index, level, heldout=index % 2 == 1) for index in range(30)]
        counts[unique] = [count_by_sets(puzzle.inputs, BOXES[size]) for puzzle in puzzles]
    assert counts[True] == [1] * 30
    assert counts[False].count(2) > 10


def test_what_is_removable_from_9x9_leaves_one_solution_and_nothing_more_can_go():
    solver = Solver(3, 3)
    rng = np.random.default_rng(5)
    board = np.array(solver.random_board(rng))
    removable = np.array(solver.removable(board.tolist(), rng))
    puzzle = np.where(removable, 0, board)
    assert removable.sum() >= 51
    assert count_by_sets(puzzle, (3, 3)) == 1
    for cell in np.flatnonzero(puzzle)[:5]:
        assert count_by_sets(np.where(np.arange(81) == cell, 0, puzzle), (3, 3)) == 2


@pytest.mark.slow
def test_unique_puzzles_of_9x9_have_one_solution():
    task = find_task("sudoku", {"size": 9, "unique": True})
    for index, heldout in itertools.product(range(20), (False, True)):
        assert count_by_sets(task.problem(0, index, 51, heldout=heldout).inputs, (3, 3)) == 1


@pytest.mark.parametrize("unique", [False, True])
def test_no_row_of_givens_is_both_for_training_and_held_out(unique):
    """4x4 at 12 empty cells has so few puzzles that the same generator without parts would repeat itself."""
    task = find_task("sudoku", {"unique": unique})
    drawn = [[task.problem(seed, index, 12, heldout=heldout).inputs for index in range(500)]
             for seed, heldout in ((0, False), (1, False), (0, True))]
    train, again, heldout = ({cells.tobytes() for cells in part} for part in drawn)
    assert train & again or not unique  # the control: within a part puzzles repeat
    assert not (train | again) & heldout
    assert all(is_heldout(cells) for cells in drawn[2])


def test_the_stocks_for_training_and_measuring_differ():
    for size in (6, 9):
        train, heldout = ({board.tobytes() for board in board_stock(size, False, part)[0]} for part in (False, True))
        assert not train & heldout


def test_any_valid_completion_is_right():
    task = find_task("sudoku")
    problem = next(p for p in (task.problem(0, index, 12) for index in range(100))
                   if count_by_sets(p.inputs, (2, 2)) == 2)
    solutions = list(Solver(2, 2).solutions(problem.inputs.tolist()))
    others = [np.array(solution) for solution in solutions if solution != problem.targets.tolist()]
    assert others
    assert all(task.is_right(problem, other) for other in others)


def test_a_broken_completion_is_wrong():
    task = find_task("sudoku", {"size": 6})
    problem = task.problem(0, 0, 24)
    for cell in np.flatnonzero(problem.scored):
        for digit in range(8):  # a blank, every other digit, and a token that there is not
            broken = problem.targets.copy()
            broken[cell] = digit
            assert task.is_right(problem, broken) == (digit == problem.targets[cell])


def test_a_valid_board_that_does_not_fit_the_givens_is_wrong(boards_4x4):
    task = find_task("sudoku")
    problem = task.problem(0, 1, 6)
    changed = 0
    for board in map(np.array, boards_4x4):
        fills = np.where(problem.scored, board, problem.inputs)  # the givens stay as they are
        assert task.is_right(problem, board) == (tuple(fills.tolist()) in boards_4x4)
        changed += not task.is_right(problem, board)
    assert changed > 200


@pytest.mark.parametrize("size", BOXES)
def test_coordinates_name_row_column_and_box(size):
    task = find_task("sudoku", {"size": size})
    board = board_stock(size, False, False)[0][0, 0].ravel()
    where = task.coordinates(size**2)
    assert where.shape == (size**2, 3)
    for axis in range(3):
        for unit in range(size):
            assert sorted(board[where[:, axis] == unit]) == list(range(1, size + 1))
    assert task.shape(size**2) == (size, size)


def sudoku_rows(count, size=4):
    task = find_task("sudoku", {"size": size})
    return [as_text(task, task.problem(0, index, 5 + index % 5)) for index in range(count)]


def test_sudoku_from_a_file_keeps_its_rows_and_splits_them(tmp_path):
    rows = sudoku_rows(60)
    task = find_task("sudoku", {"path": write_csv(tmp_path / "puzzles.csv", rows)})
    drawn = {heldout: {as_text(task, task.problem(0, index, 9, heldout=heldout)) for index in range(600)}
             for heldout in (False, True)}
    assert drawn[False] | drawn[True] == set(rows)
    assert not drawn[False] & drawn[True]
    assert rows[0] in drawn[True]
    assert len(drawn[False]) > len(drawn[True])
    assert task.trained == (9, 9)
    assert {question.count(".") for question, _ in
            (as_text(task, task.problem(0, index, 7)) for index in range(100))} == {5, 6, 7}


def test_sudoku_from_a_folder_takes_its_two_files(tmp_path):
    rows = sudoku_rows(8, size=9)
    write_csv(tmp_path / "train.csv", rows[:5])
    write_csv(tmp_path / "test.csv", rows[5:])
    task = find_task("sudoku", {"size": 9, "path": str(tmp_path)})
    assert {as_text(task, task.problem(0, index, 9)) for index in range(50)} == set(rows[:5])
    assert {as_text(task, task.problem(0, index, 9, heldout=True)) for index in range(50)} == set(rows[5:])


def test_an_evaluation_takes_each_held_out_puzzle_of_a_file_once(tmp_path):
    """By difficulty, as many as are asked for or all; the first ones are the same whatever the number."""
    write_csv(tmp_path / "train.csv", sudoku_rows(3))
    write_csv(tmp_path / "test.csv", rows := sudoku_rows(60)[20:])
    rows = {row for row in rows if row[0].count(".") <= 7}
    data = prepare_task(TaskConfig(name="sudoku", options={"path": str(tmp_path)}))
    taken = [as_text(data.task, problem) for problem in data.heldout(1000, 7)]
    assert len(taken) == len(rows)
    assert set(taken) == rows
    assert [as_text(data.task, problem) for problem in data.heldout(5, 7)] == taken[:5]
    assert taken != sorted(taken)
    assert len(data.heldout(1000, 6)) < len(taken)
    assert data.num_heldout(5, 7) == 5
    generated = prepare_task(TaskConfig(name="sudoku", options={"size": 4}))
    assert len(generated.heldout(300, 6)) == 300


@pytest.mark.parametrize("num_puzzles", [None, 2])
def test_files_that_were_written_anew_are_read_again_whatever_their_size_and_date(tmp_path, num_puzzles):
    rows = sudoku_rows(8, size=9)
    options = {"size": 9, "path": str(tmp_path), "num_puzzles": num_puzzles}
    for trained, tested in ((rows[:3], rows[3:4]), (rows[4:7], rows[3:4]), (rows[4:7], rows[7:])):
        for name, part in (("train.csv", trained), ("test.csv", tested)):
            write_csv(tmp_path / name, part)
            os.utime(tmp_path / name, (0, 0))
        task = find_task("sudoku", options)
        found = {as_text(task, task.problem(0, index, 9)) for index in range(50)}
        assert found <= set(trained)
        assert len(found) == (num_puzzles or len(trained))
        assert as_text(task, task.problem(0, 0, 9, heldout=True)) == tested[0]


GOOD = ("12..3412214343..", "1234341221434321")


@pytest.mark.parametrize(("rows", "why"), [
    ([GOOD, ("12..3412214343.", GOOD[1])], "row 2: question and answer have 15 and 16 cells"),
    ([GOOD, ("x2..3412214343..", GOOD[1])], "row 2: it has a character that is none of"),
    ([GOOD, ("42..3412214343..", GOOD[1])], "row 2: it has an answer that changes a given"),
    ([GOOD, ("1...3412214343..", "1334341221434321")], "row 2: it has an answer without every digit"),
    ([GOOD, (GOOD[0], GOOD[0])], "row 2: it has an answer without every digit in every row"),
    ([GOOD, (GOOD[1], GOOD[1])], "row 2: it has no empty cell"),
    ([GOOD], "one row"),
    ([], "no rows"),
    ([("1.", "12"), ("1.", "12")], "boards have 16, 36 or 81"),
    ([(GOOD[0] + ",", GOOD[1])], "row 1: it has 5 columns"),
    (sudoku_rows(3, size=9), "set size: 9"),
])
def test_a_bad_sudoku_file_is_named_in_one_sentence(tmp_path, rows, why):
    with pytest.raises(UserError, match=why) as error:
        find_task("sudoku", {"path": write_csv(tmp_path / "bad.csv", rows)})
    assert "\n" not in str(error.value)
    assert "bad.csv" in str(error.value)


def test_a_file_that_is_missing_or_has_other_columns_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.csv cannot be read.*columns source, question"):
        find_task("sudoku", {"path": str(tmp_path / "nothing.csv")})
    with pytest.raises(UserError, match=r"train\.csv cannot be read"):
        find_task("sudoku", {"path": str(tmp_path)})
    with pytest.raises(UserError, match="does not have the columns"):
        find_task("sudoku", {"path": write_csv(tmp_path / "other.csv", [GOOD], head="a,b,c,d")})


@pytest.mark.parametrize(("options", "level", "why"), [
    ({"size": 5}, 10, r"task\.options\.size 5 .* 4, 6, 9"),
    ({"unique": "yes"}, 10, r"task\.options\.unique .* 'yes'"),
    ({"unique": True, "path": "a.csv"}, 10, "keep one"),
    ({"sise": 4}, 10, "did you mean 'size'"),
    ({}, 0, "begins at difficulty 1"),
    ({}, 16, r"ends at difficulty 15 .*got 16; take"),
    ({"unique": True}, 13, "ends at difficulty 12 .*with one solution"),
])
def test_a_bad_sudoku_setting_is_named_in_one_sentence(options, level, why):
    with pytest.raises(UserError, match=why) as error:
        find_task("sudoku", options).problem(0, 0, level)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("options", "level", "expected"), [
    ({}, 10, "6487e5aa957c"), ({"unique": True}, 10, "4c8dce1c08b1"), ({"size": 6}, 24, "17374013876d"),
    ({"size": 6, "unique": True}, 24, "a0552d39e063"), ({"size": 9}, 51, "d449487288ef"),
])
def test_a_sudoku_is_a_function_of_seed_index_and_level(options, level, expected):
    task = find_task("sudoku", options)
    assert fingerprint(task.problem(7, 11, level)) == expected
    board_stock.cache_clear()
    assert fingerprint(find_task("sudoku", options).problem(7, 11, level)) == expected
    others = {fingerprint(task.problem(*numbers)) for numbers in ((8, 11, level), (7, 12, level), (7, 11, level - 1))}
    assert len(others | {expected}) == 4
