"""Mazes against a search that is written another way; files of mazes."""

import itertools

import numpy as np
import pytest
from puzzle_helpers import as_text, fingerprint, write_csv

from looped.data.task import find_task
from looped.errors import UserError


def ways(text, side):
    """Every shortest way as a set of cells between S and G: distances by relaxation, then all descents."""
    free = {cell for cell, symbol in enumerate(text) if symbol != "#"}
    beside = {cell: [other for other in (cell - side, cell + side, *([cell - 1] if cell % side else []),
                                         *([cell + 1] if (cell + 1) % side else [])) if other in free] for cell in free}
    start, goal = text.index("S"), text.index("G")
    far = dict.fromkeys(free, len(text))
    far[goal] = 0
    for _ in free:  # Bellman-Ford: slow, and nothing like a queue
        far = {cell: min([far[cell], *(far[other] + 1 for other in beside[cell])]) for cell in free}

    def descend(cell, way):
        if cell == goal:
            return [frozenset(way - {start, goal})]
        return [full for other in beside[cell] if far[other] == far[cell] - 1 for full in descend(other, way | {other})]

    return descend(start, {start}), free, beside


def text_of(task, cells):
    return "".join(task.symbols[token] for token in cells)


def marked(problem, way):
    """The answer that marks these cells."""
    answer = problem.inputs.copy()
    answer[list(way)] = 5
    return answer


@pytest.mark.parametrize("side", [3, 9, 10, 13, 21])
def test_a_maze_is_a_spanning_tree_and_its_target_the_one_way(side):
    task = find_task("maze")
    for index, heldout in itertools.product(range(3), (False, True)):
        problem = task.problem(0, index, side, heldout=heldout)
        odd = side - 1 + side % 2
        rooms = (odd + 1) // 2
        assert len(problem) == odd**2
        text = text_of(task, problem.inputs)
        (way,), free, beside = ways(text, odd)
        assert len(free) == 2 * rooms**2 - 1  # every room, and a wall opened for each but one
        assert sum(map(len, beside.values())) == 2 * (len(free) - 1)  # a tree: cells - 1 edges; connected, as:
        reached, last = {text.index("S")}, set()
        while reached != last:
            last = reached
            reached = reached | {other for cell in reached for other in beside[cell]}
        assert reached == free
        assert all(cell // odd % 2 == cell % odd % 2 == 0 for cell in (text.index("S"), text.index("G")))
        assert set(np.flatnonzero(problem.targets == 5)) == way
        assert set(np.flatnonzero(problem.scored)) == {cell for cell in free if text[cell] == " "}
        assert (problem.inputs == problem.targets)[~problem.scored].all()


def test_in_a_maze_with_loops_any_shortest_way_is_right_and_a_longer_one_is_not():
    task = find_task("maze", {"loops": 0.5})
    several = 0
    for index in range(12):
        problem = task.problem(0, index, 9)
        found, _, _ = ways(text_of(task, problem.inputs), 9)
        assert set(np.flatnonzero(problem.targets == 5)) in found
        assert all(task.is_right(problem, marked(problem, way)) for way in found)
        several += len(found) > 1
        if len(found) > 1 and found[0] | found[1] != found[0]:
            assert not task.is_right(problem, marked(problem, found[0] | found[1]))
    assert several > 2


def test_without_walls_every_way_as_short_is_right_and_a_detour_is_not():
    task = find_task("maze", {"loops": 1.0})
    problem = next(p for p in (task.problem(0, index, 5) for index in range(200))
                   if {*np.flatnonzero((p.inputs == 3) | (p.inputs == 4))} == {0, 2})  # S and G, one wall cell between
    assert task.is_right(problem, marked(problem, {1}))
    detour = {5, 10, 11, 12, 7}  # down, along, and up again
    assert not task.is_right(problem, marked(problem, detour))
    assert not task.is_right(problem, marked(problem, {1} | detour))


def test_a_way_with_one_cell_less_or_more_is_wrong():
    task = find_task("maze")
    problem = task.problem(0, 0, 9)
    assert task.is_right(problem, problem.targets)
    for cell in np.flatnonzero(problem.scored):
        for token in range(7):  # 6 is no symbol
            answer = problem.targets.copy()
            answer[cell] = token
            assert task.is_right(problem, answer) == (token == problem.targets[cell])


def test_what_an_answer_says_of_walls_and_ends_is_ignored():
    task = find_task("maze")
    problem = task.problem(0, 0, 9)
    assert task.is_right(problem, np.where(problem.scored, problem.targets, 5))


def test_a_maze_opens_as_many_walls_as_loops_says():
    for loops, opened in ((0.25, 4), (1.0, 16)):
        problem = find_task("maze", {"loops": loops}).problem(0, 0, 9)
        assert (problem.inputs != 1).sum() == 2 * 25 - 1 + opened


def test_every_small_maze_is_drawn_and_none_in_both_parts():
    """2x2 rooms: 4 spanning trees, each of them such a walk, and 12 pairs of start and goal."""
    task = find_task("maze")
    train, heldout = ({task.problem(0, index, 3, heldout=part).inputs.tobytes() for index in range(800)}
                      for part in (False, True))
    assert not train & heldout
    assert heldout
    assert len(train | heldout) == 24  # walks of three steps: 4 starts, 2 directions; 3 goals


def test_a_maze_is_a_function_of_seed_index_and_level():
    task = find_task("maze")
    assert fingerprint(task.problem(7, 11, 9)) == "05d9606f99be"
    assert fingerprint(find_task("maze", {"loops": 0.2}).problem(7, 11, 9)) == "edb8b70ce12e"
    numbers = ((7, 11, 9), (8, 11, 9), (7, 12, 9), (7, 11, 7))
    assert len({fingerprint(task.problem(*each)) for each in numbers}) == len(numbers)


def test_mazes_from_a_file_keep_their_rows(tmp_path):
    task = find_task("maze", {"loops": 0.5})
    rows = [as_text(task, task.problem(0, index, 9)) for index in range(20)]
    read = find_task("maze", {"path": write_csv(tmp_path / "mazes.csv", rows)})
    assert read.trained == (9, 9)
    assert read.coordinates(81)[10].tolist() == [1, 1]
    parts = []
    for heldout in (False, True):
        problems = [read.problem(0, index, 9, heldout=heldout) for index in range(200)]
        assert all(read.is_right(problem, problem.targets) for problem in problems)
        parts.append({as_text(read, problem) for problem in problems})
    assert parts[0] | parts[1] == set(rows)
    assert not parts[0] & parts[1]
    with pytest.raises(UserError, match="side 9, got difficulty 13"):
        read.problem(0, 0, 13)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    head = "\ufeffsource,question,answer,rating"
    read = find_task("maze", {"path": write_csv(tmp_path / "mazes.csv", [MAZE] * 9, head)})
    assert as_text(read, read.problem(0, 0, 3)) == MAZE


MAZE = ("S # #  G ", "S #o# oG ")


@pytest.mark.parametrize(("row", "why"), [
    (("S # # .G ", "So# #ooGo"), "question of other characters"),
    (("S # #  S ", "So# #ooSo"), "not one S and one G"),
    (("S # #  G ", "So####oGo"), "answer with other walls"),
    (("S # #  G ", "So# #oSGo"), "answer with other characters"),
    (("S # #  G ", "So# #  G "), "does not lead from S to G"),
    (("S # #  G ", "So# #ooGo"), "does not lead from S to G"),  # touches both, but is not connected
    (("S # #  G", "So# #ooG"), "8 and 8 cells"),
    (("S # #  Gx", "So# #ooGx"), "is none of"),
])
def test_a_bad_maze_file_is_named_in_one_sentence(tmp_path, row, why):
    with pytest.raises(UserError, match=f"row 2: .*{why}") as error:
        find_task("maze", {"path": write_csv(tmp_path / "bad.csv", [MAZE, row])})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("options", "level", "why"), [
    ({"loops": 2}, 9, r"task\.options\.loops .* got 2; take one from 0 to 1"),
    ({"loops": "many"}, 9, "loops"),
    ({"loops": 0.1, "path": "a.csv"}, 9, "keep one"),
    ({}, 2, "begins at difficulty 3"),
])
def test_a_bad_maze_setting_is_named_in_one_sentence(options, level, why):
    with pytest.raises(UserError, match=why) as error:
        find_task("maze", options).problem(0, 0, level)
    assert "\n" not in str(error.value)
