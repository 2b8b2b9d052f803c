"""Evaluations add up: no row is lost to a later one, to one at the same time, to Ctrl-C or to a folder that refuses."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest

from looped.cli import main
from looped.config import load_config
from looped.errors import UserError
from looped.evaluation import result_files, solving
from looped.evaluation.metric_rows import Row
from looped.evaluation.result_files import EXAMPLES, ROWS, EvaluationFiles, changed_settings, merge
from looped.inference import denoiser_rollout
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

TINY = {"task.name": "prefix-sums", "task.difficulty": [2, 4], "model.width": 16, "model.num_heads": 2,
        "model.num_core_layers": 1, "denoise.context": "inject", "denoise.cond_width": 8, "denoise.target.dim": 4,
        "training.budget": 1, "training.batch_size": 4, "training.threads": 1, "optim.ema_decay": 0.5,
        "evaluation.num_problems": 6, "evaluation.depths": [1, 2], "evaluation.difficulties": [3]}


@pytest.fixture
def run(tmp_path):
    train(load_config(None, TINY), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    for part in range(4):
        (path / f"{part}.txt").write_text(f"{part} " + "def f(x):\n    return x + 1\n" * 60)
    train(load_config(None, {
        "model.width": 16, "model.num_heads": 2, "denoise.cond_width": 8, "data.path": str(path / "*.txt"),
        "data.cache_dir": str(path / "tokens"), "data.length": 16, "data.vocab_size": 270, "data.heldout": 0.3,
        "training.budget": 1, "training.batch_size": 2, "training.threads": 1, "evaluation.num_sequences": 2,
        "evaluation.prompt_length": 4, "evaluation.sample_length": 4}), path / "run")
    return path / "run"


def lines(run, name=ROWS):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def measured(run, metric="solved"):
    """(step, settings, difficulty, depth) of each row."""
    return [(row["step"], row.get("settings"), row.get("difficulty"), row["depth"]) for row in lines(run)
            if row["metric"] == metric]


# ---- one after another


def test_other_depths_and_difficulties_are_added(run):
    assert main(["eval", str(run)]) == 0
    first = lines(run)
    assert main(["eval", str(run), "--depths", "2,4", "--difficulties", "3,5"]) == 0
    assert sorted(place[2:] for place in measured(run)) == [(3, 1), (3, 2), (3, 4), (5, 2), (5, 4)]
    assert [row for row in first if row["depth"] == 1] == [row for row in lines(run) if row["depth"] == 1]
    assert len(lines(run, EXAMPLES)) == 5
    page = (run / "report.html").read_text()
    assert all(f"depth {depth}</th>" in page for depth in (1, 2, 4))  # what was measured before, too
    assert "bits 5:" in page


def test_other_settings_and_weights_are_kept_apart_and_named(run, tmp_path, capsys):
    for flags in ([], ["--denoise.solver", "heun"], ["--raw"], ["--evaluation.batch_size", "2"], ["--denoise.solver",
                                                                                              "ancestral"]):
        assert main(["eval", str(run), "--depths", "2", *flags]) == 0
    # How many problems are solved at once decides nothing, and ancestral is what the run was trained with.
    assert sorted(measured(run), key=str) == [(1, "denoise.solver=heun", 3, 2), (1, "weights=last", 3, 2),
                                              (1, None, 3, 2)]
    capsys.readouterr()
    assert main(["plot", str(run), "--out", str(tmp_path / "all.png")]) == 0
    table = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:5]] == [
        "run, denoise.solver=heun, difficulty 3", "run, weights=last, difficulty 3",
        "run, settings of training, difficulty 3"]


def test_changed_settings_are_those_that_decide_a_figure():
    trained = load_config(None, TINY)
    evaluated = trained.replace(**{"denoise.solver": "heun", "evaluation.depths": [9], "evaluation.num_problems": 7})
    assert changed_settings(trained, evaluated) == "denoise.solver=heun evaluation.num_problems=7"
    assert changed_settings(trained, trained) == ""


def test_figures_of_before_and_after_a_change_of_the_config_are_kept_apart(run):
    """A finished run takes over other settings of evaluation, which is no reason to mix their figures."""
    assert main(["eval", str(run)]) == 0
    train(load_config(None, TINY | {"evaluation.num_problems": 4}), run)
    assert main(["eval", str(run), "--depths", "4"]) == 0
    assert main(["eval", str(run), "--depths", "1", "--evaluation.num_problems", "6"]) == 0
    assert {(*place, row["n"]) for place, row in zip(measured(run), (
        row for row in lines(run) if row["metric"] == "solved"), strict=True)} == {
        (1, None, 3, 1, 6), (1, None, 3, 2, 6), (1, "evaluation.num_problems=4", 3, 4, 4)}


def test_figures_of_other_weights_at_the_same_step_are_kept_apart(tmp_path):
    """What a larger budget leaves behind: the decayed end of the smaller one."""
    longer = TINY | {"optim.schedule": "wsd", "training.checkpoint_every": 1, "training.keep_checkpoints": 9}
    for budget in (5, 8):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(load_config(None, longer | {"training.budget": budget}), tmp_path / "run")
        assert main(["eval", str(tmp_path / "run"), "--step", "5", "--depths", str(budget)]) == 0
    assert main(["eval", str(tmp_path / "run"), "--step", "4", "--depths", "1"]) == 0  # of both
    assert measured(tmp_path / "run") == [(5, None, 3, 5), (5, "training.budget=8", 3, 8), (4, None, 3, 1)]


def test_one_folder_keeps_other_data_and_other_runs_apart(text_run, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other.txt"
    other.write_text("quite another text " * 60)
    shutil.copytree(text_run, tmp_path / "copy")
    for run, depth, *flags in ((text_run, "1,2"), (text_run, "2", "--text", str(other)), (tmp_path / "copy", "2")):
        assert main(["eval", str(run), "--depths", depth, "--out", str(out), *flags]) == 0
    found = [(row["run"], row.get("data"), row["depth"]) for row in lines(out) if row["metric"] == "nats_per_token"]
    (mine, none, one), (_, _, two), (_, data, _), (copy, _, _) = found
    assert (mine, none, one, two, copy) == (str(text_run), None, 1, 2, str(tmp_path / "copy"))
    assert "other.txt" in data
    capsys.readouterr()
    assert main(["plot", str(out), "--out", str(tmp_path / "x.png")]) == 0
    assert len({line.split("|")[1] for line in capsys.readouterr().out.splitlines()[2:6]}) == 3


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EINVAL, errno.EACCES])
def test_a_file_system_without_locks_of_the_kernel_takes_figures(run, monkeypatch, code):
    def fail(*args):
        raise OSError(code, "no such call")

    monkeypatch.setattr(fcntl, "flock", fail)
    assert main(["eval", str(run), "--depths", "1"]) == 0
    assert [depth for *_, depth in measured(run)] == [1]


def test_evaluations_that_make_one_folder_at_the_same_time_do_not_meet(tmp_path):
    """The config of a new folder is written once."""
    program = ("import sys\nfrom pathlib import Path\nfrom looped.config import load_config\n"
               "from looped.evaluation.result_files import EvaluationFiles\nconfig = load_config(None)\n"
               "print('ready', flush=True)\nsys.stdin.readline()\n"
               "for i in range(40):\n    EvaluationFiles(Path(sys.argv[1]) / str(i), 1).check(config)\n")
    both = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:  # both are ready before either begins
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate()[1] for process in both] == ["", ""]


def test_a_newer_line_replaces_the_one_with_its_key():
    old = [{"step": 1, "metric": "a", "depth": depth, "mean": 0} for depth in (1, 2)]
    new = [{"step": 1, "metric": "a", "depth": 2, "mean": 5}, {"step": 2, "metric": "a", "depth": 1, "mean": 6}]
    assert merge(old, new, ("step", "metric", "depth")) == [old[0], *new]


def test_a_damaged_line_goes_and_the_others_stay(run):
    assert main(["eval", str(run)]) == 0
    with (run / ROWS).open("a") as file:
        file.write('{"metric": "sol')
    assert main(["plot", str(run), "--out", str(run / "x.png")]) == 2
    assert main(["eval", str(run), "--depths", "4"]) == 0
    assert [depth for *_, depth in measured(run)] == [1, 2, 4]


# ---- at the same time


def add_together(folder, monkeypatch, num=8):
    """Lines of as many evaluations that write at the same time; each reads slowly, so that all have read before any
    writes."""
    (folder / "eval").mkdir(parents=True)
    read, start = result_files.read_lines, threading.Barrier(num)

    def slow(path):
        found = read(path)
        time.sleep(0.02)
        return found

    def add(depth):
        start.wait()
        EvaluationFiles(folder, 1).keep([Row("solved", 0.0, None, None, 1, depth=depth)])

    monkeypatch.setattr(result_files, "read_lines", slow)
    with ThreadPoolExecutor(num) as pool:
        list(pool.map(add, range(num)))
    monkeypatch.undo()
    return sorted(line["depth"] for line in lines(folder))


def test_evaluations_at_the_same_time_lose_nothing(tmp_path, monkeypatch):
    assert add_together(tmp_path / "held", monkeypatch) == list(range(8))
    monkeypatch.setattr(EvaluationFiles, "lock", lambda self: nullcontext())  # the positive control
    monkeypatch.setattr(os, "getpid", threading.get_ident)  # threads stand for processes
    assert len(add_together(tmp_path / "free", monkeypatch)) < 8


# ---- Ctrl-C


def interrupting(function, depth):
    def wrapped(*args, **options):
        if any(value in (depth, (depth,)) for value in args if isinstance(value, int | tuple)):
            raise KeyboardInterrupt
        return function(*args, **options)

    return wrapped


def test_ctrl_c_keeps_the_depths_of_a_task_that_are_done(run, monkeypatch, capsys):
    monkeypatch.setattr(solving, "score", interrupting(solving.score, 4))
    capsys.readouterr()
    assert main(["eval", str(run), "--depths", "1,2,4,8"]) == 130
    said = capsys.readouterr()
    assert said.err == f"\ninterrupted; {run / ROWS} holds depth 1, 2 of step 1\n"
    assert said.out == ""
    assert [depth for *_, depth in measured(run)] == [line["depth"] for line in lines(run, EXAMPLES)] == [1, 2]


def test_ctrl_c_keeps_the_depths_of_a_text_that_are_done(text_run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(denoiser_rollout, "bound", interrupting(denoiser_rollout.bound, 4))
        assert main(["eval", str(text_run), "--depths", "1,2,4", "--out", str(tmp_path)]) == 130
    assert "holds depth 1, 2 of step 1" in capsys.readouterr().err
    cut = lines(tmp_path)
    assert {row["depth"] for row in cut} == {1, 2}
    # The whole evaluation goes over the same depths again, and finds the same.
    assert main(["eval", str(text_run), "--depths", "1,2,4", "--out", str(tmp_path)]) == 0
    whole = {(row["metric"], row.get("depth")): row["mean"] for row in lines(tmp_path)}
    assert all(whole[row["metric"], row["depth"]] == row["mean"] for row in cut)
    assert len(lines(tmp_path)) == len({json.dumps({**row, "mean": 0}) for row in lines(tmp_path)})


# ---- a folder that refuses


def test_a_folder_that_refuses_is_said_before_anything_is_computed(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(solving, "score", lambda *args, **options: pytest.fail("computed"))
    (run / "eval").write_text("no folder")
    capsys.readouterr()
    assert main(["eval", str(run)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert f"cannot write the evaluation to {run}: File exists" in said.err
    assert "choose another folder with --out" in said.err
    monkeypatch.undo()
    assert main(["eval", str(run), "--out", str(tmp_path / "new/elsewhere")]) == 0
    assert [depth for *_, depth in measured(tmp_path / "new/elsewhere")] == [1, 2]
    assert (tmp_path / "new/elsewhere/report.html").exists()
    assert (run / "eval").read_text() == "no folder"
    assert main(["plot", str(tmp_path / "new/elsewhere"), "--out", str(tmp_path / "x.png")]) == 0


def test_a_disk_that_fills_up_is_one_sentence(tmp_path, monkeypatch):
    files = EvaluationFiles(tmp_path, 1)
    files.check(load_config(None, TINY))

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left on device; free space or permissions"):
        files.keep([Row("solved", 0.0, None, None, 1, depth=1)])
