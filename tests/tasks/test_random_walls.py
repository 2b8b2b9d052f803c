"""Mazes of random walls and of long paths, against scipy's search; a file of the form of Maze-Hard."""

import numpy as np
import pytest
from puzzle_helpers import as_text, fingerprint, write_csv
from scipy.sparse import coo_array
from scipy.sparse.csgraph import shortest_path

from looped.config import load_config
from looped.config.data import TaskConfig
from looped.data.task import find_task
from looped.data.task_data import prepare_task
from looped.errors import UserError
from looped.evaluation.options import Options
from looped.evaluation.solving import levels_of
from looped.tasks import maze_grids
from looped.tasks.maze_grids import far_cells


def distances(free, start):
    """Steps from a cell of a square to every other, by scipy; infinite where there is no path."""
    side = int(len(free) ** 0.5)
    cells = np.arange(len(free)).reshape(side, side)
    pairs = np.concatenate([np.stack([cells[:, :-1], cells[:, 1:]], -1).reshape(-1, 2),
                            np.stack([cells[:-1], cells[1:]], -1).reshape(-1, 2)])
    pairs = pairs[free[pairs].all(axis=1)]
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(free), len(free)))
    return shortest_path(graph.tocsr(), directed=False, unweighted=True, indices=start)


@pytest.mark.parametrize("side", [3, 8, 30])
def test_the_cells_that_are_far_are_those_of_another_search(side):
    rng = np.random.default_rng(0)
    for _ in range(10):
        free = rng.random(side**2) > 0.35
        start = int(rng.choice(np.flatnonzero(free)))
        far = distances(free, start)
        for least in (1, side // 2, side, 2 * side):
            expected = np.flatnonzero(np.isfinite(far) & (far >= least))
            assert far_cells(free, start, least).tolist() == expected.tolist()


def steps_of(task, problem):
    """(steps of the path in the answer, steps of a shortest path by scipy)."""
    start, goal = (int(np.flatnonzero(problem.inputs == token)[0]) for token in (maze_grids.START, maze_grids.GOAL))
    return (problem.targets == maze_grids.WAY).sum() + 1, distances(problem.inputs != maze_grids.WALL, start)[goal]


@pytest.mark.parametrize(("options", "side", "least"), [
    ({"walls": "random"}, 12, 11), ({"walls": "random", "min_path": 20}, 12, 20), ({"walls": "random"}, 9, 8),
    ({"min_path": 30}, 13, 30), ({"min_path": 12, "loops": 0.4}, 9, 12)])
def test_a_path_is_shortest_and_as_long_as_asked_for(options, side, least):
    task = find_task("maze", options)
    lengths = []
    for index in range(6):
        problem = task.problem(0, index, side, heldout=index % 2 == 1)
        marked, shortest = steps_of(task, problem)
        assert marked == shortest >= least
        assert task.is_right(problem, problem.targets)
        assert len(problem) == side**2
        lengths.append(shortest)
    assert len(set(lengths)) > 1


def test_walls_are_three_to_five_tenths_of_the_cells_anywhere():
    task = find_task("maze", {"walls": "random", "min_path": 1})
    walls = np.array([task.problem(0, index, 20).inputs == maze_grids.WALL for index in range(150)])
    shares = walls.mean(axis=1)
    assert shares.min() < 0.32
    assert 0.48 < shares.max() <= 0.5
    assert walls.any(axis=0).all()


def test_a_maze_of_30x30_has_a_shortest_path_longer_than_110():
    """The rule of Maze-Hard."""
    task = find_task("maze", {"walls": "random", "min_path": 111})
    marked, shortest = steps_of(task, task.problem(0, 0, 30))
    assert marked == shortest > 110


@pytest.mark.parametrize(("options", "sides"), [
    ({}, (9, 13, 17)), ({"min_path": 27}, (9, 13, 17)), ({"min_path": 28}, (13, 17)), ({"min_path": 111}, ()),
    ({"walls": "random", "min_path": 27}, (9, 13, 17)), ({"walls": "random", "min_path": 111}, ()),
    ({"loops": 1.0, "min_path": 9}, (9, 13, 17)), ({"loops": 1.0, "min_path": 10}, (13, 17))])
def test_only_sides_that_surely_have_such_paths_are_measured_by_default(options, sides):
    task = find_task("maze", options)
    assert task.tested == sides
    for side in sides:
        marked, shortest = steps_of(task, task.problem(0, 0, side, heldout=True))
        assert marked == shortest >= options.get("min_path", 1)


@pytest.mark.parametrize("walls", ["random", "carved"])
def test_mazes_of_long_paths_are_trained_on(walls):
    """A side of the defaults that no such maze has is no reason to refuse."""
    config = TaskConfig(name="maze", options={"walls": walls, "min_path": 40}, difficulty=(13, 13))
    data = prepare_task(config)
    assert data.task.tested == (17,)
    assert steps_of(data.task, data.task.problem(0, 0, 13))[1] >= 40


def test_random_walls_are_a_function_of_seed_index_and_level():
    options = {"walls": "random"}
    assert fingerprint(find_task("maze", options).problem(7, 11, 9)) == "985d3908bed3"
    assert fingerprint(find_task("maze", options).problem(7, 12, 9)) != "985d3908bed3"


def test_a_path_that_no_grid_has_is_refused(monkeypatch):
    monkeypatch.setattr(maze_grids, "GIVE_UP", 20)
    for options in ({"walls": "random"}, {"loops": 1.0}):
        with pytest.raises(UserError, match="min_path 50 is too long for mazes of side 5: none of 20 grids"):
            find_task("maze", options | {"min_path": 50}).problem(0, 0, 5)


def test_a_file_of_the_form_of_maze_hard_is_read(tmp_path):
    task = find_task("maze", {"walls": "random", "min_path": 40})
    rows = [as_text(task, task.problem(0, index, 30)) for index in range(3)]
    assert {len(question) for question, _ in rows} == {900}
    assert {*"".join(question + answer for question, answer in rows)} == set("# SGo")
    write_csv(tmp_path / "train.csv", rows[:2])
    write_csv(tmp_path / "test.csv", rows[2:])
    read = find_task("maze", {"path": str(tmp_path), "symmetries": True})
    assert (read.difficulty, read.trained, read.tested) == ("side of the maze", (30, 30), (30,))
    assert as_text(read, read.problem(0, 0, 30, heldout=True)) == rows[2]
    problems = [read.problem(0, index, 30) for index in range(9)]
    assert all(read.is_right(problem, problem.targets) for problem in problems)


def test_mazes_of_no_tested_side_are_measured_at_the_trained_one():
    """The rule of Maze-Hard, in small: no default side surely has such paths."""
    settings = {"task.name": "maze", "task.options": {"min_path": 52}, "task.difficulty": [17, 17],
                "denoise.context": "inject"}
    config = load_config(None, settings)
    data = prepare_task(config.task)
    assert data.task.tested == ()
    assert levels_of(data, config, Options()) == (17,)
    assert levels_of(data, load_config(None, settings | {"evaluation.difficulties": [9]}), Options()) == (9,)
