"""A run evaluated on the puzzles of a file, and where it fails on Sudoku."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from puzzle_helpers import as_text, write_csv

from looped.cli import main
from looped.config import load_config
from looped.data.task import find_task
from looped.data.task_data import puzzles_of_file
from looped.tasks.sudoku_techniques import deduce
from looped.training.data_identity import label_of
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

TINY = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "denoise.context": "inject",
        "denoise.cond_width": 8, "denoise.target.dim": 4, "training.batch_size": 4, "training.budget": 2,
        "training.threads": 1, "evaluation.depths": [1], "evaluation.num_problems": 4}
SUDOKU = {"task.name": "sudoku", "task.options": {"size": 4, "unique": True}, "task.difficulty": [6, 6]}


def failures():
    """scripts/sudoku_failures.py."""
    spec = importlib.util.spec_from_file_location(
        "sudoku_failures", Path(__file__).parents[2] / "scripts" / "sudoku_failures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    train(load_config(None, TINY | SUDOKU), path)
    return path


@pytest.fixture
def puzzles(tmp_path):
    task = find_task("sudoku", {"size": 4, "unique": True})
    problems = [task.problem(5, number, 8, heldout=True) for number in range(30)]
    (tmp_path / "puzzles").mkdir()
    for part in ("train", "test"):
        write_csv(tmp_path / "puzzles" / f"{part}.csv", [as_text(task, problem) for problem in problems])
    return tmp_path / "puzzles"


def test_a_run_is_evaluated_on_other_puzzles_at_their_difficulties_and_beside_its_own(run, puzzles, capsys):
    assert main(["eval", str(run), "--puzzles", str(puzzles)]) == 0
    assert "empty cells at most, trained from 6 to 6" in capsys.readouterr().out
    (rows,) = (run / "other").glob("*/eval/depth.jsonl")
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["difficulty"] for row in found if row["metric"] == "solved"} == {8}
    assert not (run / "eval" / "depth.jsonl").exists()
    assert "sudoku of puzzles" in (rows.parents[1] / "report.md").read_text()


def test_other_puzzles_have_the_name_and_the_contents_of_their_file(run, puzzles, tmp_path):
    """Not its path: the same puzzles elsewhere are the same data, others of the same name are not."""
    def label(path):
        return label_of(puzzles_of_file(load_config(run / "config.yaml").task, str(path)))

    first = label(puzzles)
    assert first.startswith("sudoku of puzzles (")
    assert label(shutil.copytree(puzzles, tmp_path / "copied" / "puzzles")) == first
    fewer = shutil.copytree(puzzles, tmp_path / "fewer" / "puzzles")
    lines = (fewer / "test.csv").read_text().splitlines()
    (fewer / "test.csv").write_text("\n".join(lines[:12]) + "\n")
    assert label(fewer) != first


def test_difficulties_of_the_command_are_measured(run, puzzles, capsys):
    assert main(["eval", str(run), "--puzzles", str(puzzles), "--evaluation.difficulties", "[9]", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["difficulty"] for row in rows} == {9}


def test_puzzles_of_another_size_or_for_a_task_without_files_are_refused(run, puzzles, tmp_path, capsys):
    nine = find_task("sudoku", {"size": 9, "unique": True})
    path = write_csv(tmp_path / "nine.csv", [as_text(nine, nine.problem(0, n, 40)) for n in range(4)])
    assert main(["eval", str(run), "--puzzles", path]) == 2
    assert "has boards of size 9, and this run was trained on size 4" in capsys.readouterr().err
    assert main(["eval", str(run), "--puzzles", "nowhere.csv"]) == 2
    assert "--puzzles: nowhere.csv cannot be read" in capsys.readouterr().err
    train(load_config(None, TINY | {"task.name": "parity", "task.difficulty": [4, 4]}), tmp_path / "parity")
    assert main(["eval", str(tmp_path / "parity"), "--puzzles", str(puzzles)]) == 2
    assert "task parity reads no puzzles from files" in capsys.readouterr().err


def test_failures_are_counted_by_the_technique_and_the_round_of_each_cell(run, capsys):
    script = failures()
    script.main([str(run), "--difficulty", "8", "--depth", "1", "--num", "6", "--evaluation.batch_size", "4"])
    said = capsys.readouterr().out
    assert "puzzles not solved" in said
    task = find_task("sudoku", {"size": 4, "unique": True})
    problems = [task.problem(0, number, 9) for number in range(2)]
    right = [problems[0].targets == problems[0].targets, problems[1].targets != problems[1].targets]
    found = [script.Answered(mask, problem.scored, deduce(problem.inputs, task.box))
             for mask, problem in zip(right, problems, strict=True)]
    single = script.by_technique(found).splitlines()[2].split("|")
    assert [cell.strip() for cell in single[1:6]] == ["single", "2", "0.500", "18", "0.500"]
    assert script.wrong_cells(found) == "1 of 2 puzzles not solved, with 9 wrong cells in the median, from 9 to 9"
    counts = [int(line.split("|")[2]) for line in script.by_round(found).splitlines()[2:]]
    assert sum(counts) == 18
    assert np.argmax(counts) < 4


@pytest.mark.parametrize(("words", "why"), [
    (["--num", "0"], "at least 1"), (["--evaluation.trajectories"], "not a setting with a value"),
    (["--evaluation.trajektories=2"], "evaluation.trajektories")])
def test_a_bad_flag_of_the_script_is_one_sentence(run, words, why, capsys):
    with pytest.raises(SystemExit) as ended:
        failures().main([str(run), "--difficulty", "8", "--depth", "1", *words])
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def test_puzzles_of_several_solutions_and_other_tasks_are_refused(tmp_path, capsys):
    for name, task in (("many", SUDOKU | {"task.options": {"size": 4}, "task.difficulty": [12, 12]}),
                       ("parity", {"task.name": "parity", "task.difficulty": [4, 4]})):
        train(load_config(None, TINY | task), tmp_path / name)
        with pytest.raises(SystemExit):
            failures().main([str(tmp_path / name), "--difficulty", "4" if name == "parity" else "12", "--depth", "1"])
    said = capsys.readouterr().err
    assert "puzzles have several solutions" in said
    assert "was trained on parity; this script is for sudoku" in said
