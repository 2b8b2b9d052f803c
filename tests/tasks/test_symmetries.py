"""Symmetries of puzzles of a file: counts of the groups, published numbers of classes, and what may train."""

import itertools
import math
import warnings

import numpy as np
import pytest
from puzzle_helpers import as_text, write_csv, write_rated

from looped.config.data import TaskConfig
from looped.data.task import find_task
from looped.data.task_data import prepare_task, puzzles_of_file
from looped.errors import UserError
from looped.tasks.maze import GROUP as SQUARE
from looped.tasks.maze_symmetries import turned
from looped.tasks.puzzle_choice import Shown
from looped.tasks.puzzle_files import Puzzles
from looped.tasks.sudoku import GROUPS
from looped.tasks.sudoku_solver import Solver


def puzzles(size, count, seed=0):
    task = find_task("sudoku", {"size": size})
    made = [task.problem(seed, index, task.trained[1]) for index in range(count)]
    return [(each.inputs.astype(np.uint8), each.targets.astype(np.uint8)) for each in made]


def texts(pairs):
    return [tuple("".join(".123456789"[token] for token in cells) for cells in pair) for pair in pairs]


@pytest.mark.parametrize("size", GROUPS)
def test_there_are_as_many_orders_of_cells_as_the_closed_form_says(size):
    """9x9: 6^8 * 2, which times 9! is the size of the group."""
    group, (height, width) = GROUPS[size], GROUPS[size].box
    rows, columns = group._row_orders, group._column_orders
    assert len({tuple(order) for order in rows.tolist()}) == math.factorial(width) * math.factorial(height)**width
    assert len({tuple(order) for order in columns.tolist()}) == math.factorial(height) * math.factorial(width)**height
    if size == 9:
        assert len(rows) * len(columns) * 2 == 6**8 * 2


def test_a_drawn_symmetry_of_4x4_is_one_of_the_3072_and_most_of_them_are_drawn():
    """4! * (2! 2!^2)^2 * 2, here made one by one; the puzzle has no symmetry of its own."""
    question = np.array([1, 2, 0, 4, 0, 4, 1, 0, 0, 0, 0, 3, 0, 3, 2, 0])
    answer = np.array(next(Solver(2, 2).solutions(question.tolist())))
    orders = [[2 * band + row for band, rows in zip(bands, inner, strict=True) for row in rows]
              for bands in ((0, 1), (1, 0)) for inner in itertools.product(((0, 1), (1, 0)), repeat=2)]
    grid = question.reshape(4, 4)
    moved = [board[order][:, other] for board in (grid, grid.T) for order in orders for other in orders]
    every = {np.array((0, *names))[board].tobytes() for board in moved for names in itertools.permutations(range(1, 5))}
    assert len(every) == 3072
    rng = np.random.default_rng(0)
    drawn = {GROUPS[4].vary(question, answer, rng)[0].tobytes() for _ in range(6000)}
    assert drawn <= every
    assert len(drawn) > 0.8 * 3072  # 1 - exp(-6000 / 3072) = 0.86


@pytest.mark.parametrize(("size", "classes"), [(4, 2), (6, 49)])
def test_boards_fall_into_as_many_classes_as_is_published(size, classes):
    """4x4: 2 of 288 boards; 6x6: 49 of 28,200,960 (Wikipedia, "Mathematics of Sudoku"), of which draws meet some."""
    solver, rng = Solver(*GROUPS[size].box), np.random.default_rng(0)
    boards = list(solver.solutions([0] * 16)) if size == 4 else [solver.random_board(rng) for _ in range(30)]
    forms = {GROUPS[size].canonical(np.array(board)) for board in boards}
    assert len(forms) == classes if size == 4 else 5 < len(forms) <= classes


@pytest.mark.parametrize("size", GROUPS)
def test_symmetric_puzzles_have_the_same_form_and_invariant_and_others_have_not(size):
    rng, group = np.random.default_rng(1), GROUPS[size]
    pairs = puzzles(size, 12)
    varied = [group.vary(question, answer, rng) for question, answer in pairs]
    for (question, answer), (other, board) in zip(pairs, varied, strict=True):
        assert (other == 0).sum() == (question == 0).sum()
        assert ((other == board) | (other == 0)).all()
        assert group.canonical(other) == group.canonical(question)
        assert sorted(np.bincount(board)) == sorted(np.bincount(answer))
    both = [group.invariants(np.array(part)) for part in ([q for q, _ in pairs], [q for q, _ in varied])]
    assert (both[0] == both[1]).all()
    if size > 4:
        assert len({group.canonical(question) for question, _ in pairs}) == len(set(both[0].tolist())) == 12


def test_a_puzzle_with_one_given_elsewhere_is_no_symmetry():
    group = GROUPS[9]
    (question, answer), *_ = puzzles(9, 1)
    moved = question.copy()
    moved[np.flatnonzero(question)[0]] = 0
    empty = np.flatnonzero(question == 0)[0]
    moved[empty] = answer[empty]
    assert group.canonical(moved) != group.canonical(question)
    assert group.invariants(np.array([moved])) != group.invariants(np.array([question]))


def test_a_square_has_eight_symmetries_and_they_form_a_group():
    grid = np.arange(9).reshape(3, 3)
    images = [turned(grid, number).tobytes() for number in range(8)]
    assert len(set(images)) == 8
    again = {turned(turned(grid, a), b).tobytes() for a, b in itertools.product(range(8), repeat=2)}
    assert again == set(images)
    assert images[0] == grid.tobytes()


def test_a_turned_maze_is_solved_by_its_turned_path():
    task, rng = find_task("maze"), np.random.default_rng(0)
    problem = task.problem(0, 0, 9)
    seen = set()
    for _ in range(60):
        question, answer = SQUARE.vary(problem.inputs, problem.targets, rng)
        other = type(problem)(question, answer, question == 2)
        assert task.is_right(other, answer)
        assert SQUARE.canonical(question) == SQUARE.canonical(problem.inputs)
        assert SQUARE.invariants(question[None]) == SQUARE.invariants(problem.inputs[None])
        seen.add(question.tobytes())
    assert len(seen) == 8
    assert SQUARE.invariants(task.problem(0, 1, 9).inputs[None]) != SQUARE.invariants(problem.inputs[None])


@pytest.fixture
def folder(tmp_path):
    """A folder of eight training puzzles of 6x6 and three held-out ones, all different under symmetries."""
    rows = texts(puzzles(6, 11))
    write_csv(tmp_path / "train.csv", rows[:8])
    write_csv(tmp_path / "test.csv", rows[8:])
    return tmp_path, rows


def drawn(task, heldout, count=200):
    level = task.tested[0] if heldout else task.trained[1]
    return [as_text(task, task.problem(0, index, level, heldout=heldout)) for index in range(count)]


def cells(text):
    return np.array([".123456789".index(symbol) for symbol in text])


def test_any_symmetry_of_a_training_puzzle_is_drawn_and_held_out_ones_stay_as_they_are(folder):
    path, rows = folder
    task = find_task("sudoku", {"size": 6, "path": str(path), "symmetries": True})
    train = drawn(task, heldout=False)
    assert len(set(train)) == 200
    forms = {GROUPS[6].canonical(cells(question)) for question, _ in train}
    assert forms == {GROUPS[6].canonical(cells(question)) for question, _ in rows[:8]}
    assert set(drawn(task, heldout=True)) == set(rows[8:])


def test_a_number_of_symmetries_is_of_variants_that_stay_the_same(folder):
    path, rows = folder
    options = {"size": 6, "path": str(path), "symmetries": 3}
    train = set(drawn(find_task("sudoku", options), heldout=False, count=400))
    assert len(train) == 8 * 4
    assert train > set(rows[:8])  # each puzzle itself among them
    assert set(drawn(find_task("sudoku", options), heldout=False, count=400)) == train


def test_the_number_of_training_puzzles_is_of_a_fixed_choice(folder):
    path, rows = folder
    options = {"size": 6, "path": str(path), "num_puzzles": 3}
    data = prepare_task(TaskConfig(name="sudoku", options=options))
    chosen = {as_text(data.task, data.task.problem(seed, index, data.train.low)) for seed in range(4)
              for index in range(60)}
    assert len(chosen) == 3
    assert chosen < set(rows[:8])
    assert set(drawn(data.task, heldout=True)) == set(rows[8:])
    assert {*drawn(find_task("sudoku", options | {"num_puzzles": 8}), heldout=False)} == set(rows[:8])


def test_training_puzzles_that_are_symmetric_to_a_held_out_one_are_left_out_and_counted(folder):
    path, rows = folder
    rng = np.random.default_rng(3)
    hidden = texts([GROUPS[6].vary(*(cells(text) for text in rows[9]), rng)])
    write_csv(path / "train.csv", rows[:8] + hidden)
    options = {"size": 6, "path": str(path)}
    assert set(drawn(find_task("sudoku", options), heldout=False)) == {*rows[:8], *hidden}  # the control
    with pytest.warns(UserWarning, match="1 of the 9 training puzzles taken from .* symmetric to a held-out one"):
        task = find_task("sudoku", options | {"symmetries": 1})
    assert len(task.file.parts[0].questions) == 8
    assert not set(hidden) & set(drawn(task, heldout=False))
    with pytest.raises(UserError, match=r"has 8 training puzzles that are not symmetric to a held-out one, not 9"):
        find_task("sudoku", options | {"symmetries": 1, "num_puzzles": 9})


def test_training_puzzles_that_are_held_out_too_are_left_out_without_symmetries(folder):
    path, rows = folder
    write_csv(path / "train.csv", rows[:8] + rows[9:10])
    with pytest.warns(UserWarning, match=r"task\.options\.path: 1 of the 9 training puzzles .* are held-out ones too"):
        task = find_task("sudoku", {"size": 6, "path": str(path)})
    assert set(drawn(task, heldout=False)) == set(rows[:8])
    with pytest.raises(UserError, match=r"has 8 training puzzles that are not held-out ones too, not 9"):
        find_task("sudoku", {"size": 6, "path": str(path), "num_puzzles": 9})


@pytest.mark.parametrize("part", ["train.csv", "test.csv"])
def test_the_fingerprint_is_of_all_puzzles_of_both_parts(folder, part):
    path, rows = folder
    config = TaskConfig(name="sudoku", options={"size": 6, "path": str(path)})
    before = prepare_task(config).fingerprint
    assert prepare_task(config).fingerprint == before
    kept = {"train.csv": rows[:8], "test.csv": rows[8:]}[part]
    write_csv(path / part, kept[:-1])
    assert prepare_task(config).fingerprint != before
    write_csv(path / part, kept)
    assert prepare_task(config).fingerprint == before


@pytest.mark.parametrize("symmetries", [0, 2])
def test_measuring_a_run_on_puzzles_that_it_was_trained_on_is_said(folder, tmp_path, symmetries):
    path, rows = folder
    (other := tmp_path / "other").mkdir()
    hidden = rows[:1] if not symmetries else texts([GROUPS[6].vary(*map(cells, rows[0]), np.random.default_rng(3))])
    write_csv(other / "train.csv", rows[8:])
    config = TaskConfig(name="sudoku", options={"size": 6, "path": str(path), "symmetries": symmetries})
    write_csv(other / "test.csv", texts(puzzles(6, 14))[11:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the control: new puzzles
        puzzles_of_file(config, str(other))
    write_csv(other / "test.csv", [*texts(puzzles(6, 14))[11:], *hidden])
    with pytest.warns(UserWarning, match="was trained on 1 of the first 4 of its held-out puzzles"):
        puzzles_of_file(config, str(other))


def test_a_training_part_of_nothing_but_symmetries_of_held_out_puzzles_is_refused(tmp_path):
    ((question, answer),) = puzzles(4, 1)
    rng = np.random.default_rng(0)
    path = write_csv(tmp_path / "same.csv", texts([GROUPS[4].vary(question, answer, rng) for _ in range(9)]))
    with pytest.warns(UserWarning, match="left out"), pytest.raises(UserError, match="has 0 training puzzles"):
        find_task("sudoku", {"path": path, "symmetries": True})


def test_equal_invariants_are_made_sure_of_by_the_exact_form():
    class Same(type(GROUPS[6])):
        def invariants(self, questions):
            return np.zeros(len(questions), dtype=np.uint64)

    questions = np.array([question for question, _ in puzzles(6, 6)])
    shown = Shown(Puzzles(questions[:2], questions[:2], np.zeros(2)), Same((2, 3)))
    assert shown.among(questions).tolist() == [True, True, False, False, False, False]


def test_mazes_of_a_file_are_turned_in_training_only(tmp_path):
    task = find_task("maze")
    rows = [as_text(task, task.problem(0, index, 7)) for index in range(6)]
    write_csv(tmp_path / "train.csv", rows[:4])
    write_csv(tmp_path / "test.csv", rows[4:])
    read = find_task("maze", {"path": str(tmp_path), "symmetries": True, "num_puzzles": 3})
    assert len(set(drawn(read, heldout=False))) == 3 * 8
    assert set(drawn(read, heldout=True)) == set(rows[4:])
    side = "S # #  G ", "S #o# oG "
    places = [3 * (2 - column) + row for row in range(3) for column in range(3)]
    turned_side = tuple("".join(text[place] for place in places) for text in side)
    other = tmp_path / "other"
    other.mkdir()
    write_csv(other / "train.csv", [side, ("G # #  S ", "G #o# oS ")])
    write_csv(other / "test.csv", [turned_side])
    with pytest.warns(UserWarning, match="1 of the 2 training puzzles"):
        find_task("maze", {"path": str(other), "symmetries": True})


def test_a_rating_makes_bands_of_training_and_held_out_puzzles(folder):
    path, rows = folder
    write_rated(path / "train.csv", rows[:8], [0, 4, 9, 10, 12, 29, 30, 200])
    write_rated(path / "test.csv", rows[8:], [5, 8, 31])
    task = find_task("sudoku", {"size": 6, "path": str(path), "rating_bands": [10, 30]})
    assert (task.trained, task.tested) == ((0, 0), (0, 1, 3))  # no held-out puzzle is in band 2
    assert task.difficulty == "rating band (0: all, 1: below 10, 2: 10 to below 30, 3: from 30)"

    def band(level, heldout):
        return {as_text(task, task.problem(0, index, level, heldout=heldout)) for index in range(100)}

    assert [band(level, heldout=False) for level in range(4)] == [set(rows[:8]), set(rows[:3]), set(rows[3:6]),
                                                                 set(rows[6:8])]
    assert [band(level, heldout=True) for level in (0, 1, 3)] == [set(rows[8:]), set(rows[8:10]), set(rows[10:])]
    for level in (2, 4):
        with pytest.raises(UserError, match=f"held-out part has no puzzle of rating band {level}; take one of 0, 1, 3"):
            task.problem(0, 0, level, heldout=True)
    write_rated(path / "other.csv", rows, ["unknown", *range(10)])
    with pytest.raises(UserError, match=r"1 of .* rows of .* have none"):
        find_task("sudoku", {"size": 6, "path": str(path / "other.csv"), "rating_bands": [10, 31]})


SUDOKU_EXTREME = """source,question,answer,rating
puzzles6_forum_hardest_1106,1....7.9..3..2...8..96..5....53..9...1..8...26....4...3......1..4......7..7...3..,{escargot},23
puzzles0_kaggle,..3.2.6..9..3.5..1..18.64....81.29..7.......8..67.82....26.95..8..2.3..9..5.1.3..,{easy},0
"""


def test_a_file_of_the_form_of_sudoku_extreme_is_read_with_its_ratings(tmp_path):
    questions = [line.split(",")[1] for line in SUDOKU_EXTREME.splitlines()[1:]]
    answers = ["".join(map(str, next(Solver(3, 3).solutions(cells(question).tolist())))) for question in questions]
    content = SUDOKU_EXTREME.format(escargot=answers[0], easy=answers[1])
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text(content, encoding="utf-8", newline="\r\n")
    with pytest.warns(UserWarning, match="all 2 training puzzles of .* are held-out ones too"):
        task = find_task("sudoku", {"size": 9, "path": str(tmp_path), "rating_bands": [1]})
    assert task.file.parts[1].ratings.tolist() == [23, 0]
    assert as_text(task, task.problem(0, 0, 2, heldout=True)) == (questions[0], answers[0])
    assert as_text(task, task.problem(0, 0, 1, heldout=True)) == (questions[1], answers[1])
    with pytest.warns(UserWarning, match="2 of the 2"), pytest.raises(UserError, match="0 training puzzles"):
        find_task("sudoku", {"size": 9, "path": str(tmp_path), "symmetries": 1000})


@pytest.mark.parametrize(("name", "options", "why"), [
    ("sudoku", {"symmetries": "many"}, "symmetries 'many' is neither"),
    ("sudoku", {"symmetries": -1}, "symmetries -1 is neither"),
    ("sudoku", {"symmetries": 5}, "symmetries 5 is for the puzzles of a file"),
    ("sudoku", {"num_puzzles": 5}, "num_puzzles 5 is for the puzzles of a file"),
    ("sudoku", {"rating_bands": [5]}, "rating_bands .* is for the puzzles of a file"),
    ("sudoku", {"path": "FILE", "num_puzzles": 0}, "num_puzzles 0 is not a number of training puzzles"),
    ("sudoku", {"path": "FILE", "num_puzzles": 99}, "has 6 training puzzles, not 99"),
    ("sudoku", {"path": "FILE", "rating_bands": [9, 3]}, "not ascending numbers"),
    ("sudoku", {"path": "FILE", "rating_bands": "hard"}, "not ascending numbers"),
    ("maze", {"symmetries": 8}, "symmetries 8 is neither true"),
    ("maze", {"symmetries": True}, "symmetries True is for the puzzles of a file"),
    ("maze", {"walls": "thick"}, "walls 'thick' is neither"),
    ("maze", {"min_path": -1}, "min_path -1 is not a number of steps"),
    ("maze", {"min_path": 5, "path": "FILE"}, "min_path is for generated mazes"),
    ("maze", {"walls": "random", "path": "FILE"}, "walls random is for generated mazes"),
    ("maze", {"walls": "random", "loops": 0.5}, "loops 0.5 is for carved mazes"),
])
def test_a_bad_option_of_a_file_is_named_in_one_sentence(tmp_path, name, options, why):
    path = write_csv(tmp_path / "puzzles.csv", texts(puzzles(4, 8)))
    options = {key: path if value == "FILE" else value for key, value in options.items()}
    with pytest.raises(UserError, match=why) as error:
        find_task(name, options)
    assert "\n" not in str(error.value)
