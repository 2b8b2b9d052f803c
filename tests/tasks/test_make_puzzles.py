"""The script that writes files of hard puzzles goes on where it was interrupted, and the tasks read what it wrote."""

import importlib.util
import sys
from pathlib import Path

import pytest

from looped.data.task import find_task

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_puzzles.py"


@pytest.fixture
def make(monkeypatch, tmp_path):
    """The script as a command: arguments -> text of train.csv and test.csv."""
    spec = importlib.util.spec_from_file_location("make_puzzles", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(kind, *flags):
        monkeypatch.setattr(sys, "argv", ["make_puzzles", kind, "--out", str(tmp_path), *flags])
        module.main()
        return [(tmp_path / name).read_text(encoding="utf-8") for name in ("train.csv", "test.csv")]

    return run


def test_an_interrupted_file_goes_on_and_is_the_same(make, tmp_path):
    flags = ("--steps", "2", "--test", "1")
    whole = make("sudoku", "--train", "3", *flags)
    assert [text.count("\n") for text in whole] == [4, 2]
    (tmp_path / "train.csv").write_text(whole[0][:-100], encoding="utf-8", newline="\n")  # within the last row
    assert make("sudoku", "--train", "3", *flags) == whole
    task = find_task("sudoku", {"size": 9, "path": str(tmp_path), "symmetries": True, "rating_bands": [5]})
    problem = task.problem(0, 0, 0)
    assert task.is_right(problem, problem.targets)
    with pytest.raises(SystemExit, match="rows of another kind"):
        make("sudoku", "--train", "3", "--steps", "3", "--test", "1")


def test_mazes_are_rated_by_the_steps_of_their_path(make, tmp_path):
    train, _ = make("maze", "--side", "10", "--min-path", "12", "--train", "2", "--test", "2")
    rows = [line.split(",") for line in train.splitlines()[1:]]
    assert all(int(rating) == answer.count("o") + 1 >= 12 for _, _, answer, rating in rows)
    assert find_task("maze", {"path": str(tmp_path), "rating_bands": [12]}).tested == (0, 2)
