"""`looped compare` as a whole: equal budgets, one evaluation for all, nothing done twice, failures and Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import psutil
import pytest
from page_checks import check_alone, first_table

from looped.cli import main
from looped.compare.plan import make_plan, write_configs
from looped.compare.runner import is_finished, train_all
from looped.config import load_config
from looped.errors import UserError

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls


@pytest.fixture
def copy(done, tmp_path):
    """One that a test may change."""
    return shutil.copytree(done, tmp_path / "copy", symlinks=True)


def rows_of(out):
    return [json.loads(line) for line in (out / "compare.jsonl").read_text().splitlines()]


def test_every_arm_and_seed_gets_the_same_budget_and_is_measured_on_the_same_text(done):
    costs = [row for row in rows_of(done) if row["kind"] == "cost"]
    assert [(row["arm"], row["seed"]) for row in costs] == [("ar", 0), ("ar", 1), ("denoise", 0), ("denoise", 1)]
    assert {(row["step"], row["tokens"]) for row in costs} == {(8, 512)}
    figures = [row for row in rows_of(done) if row["kind"] == "figure" and row["metric"] == "nats_per_token"]
    assert {row["depth"] for row in figures} == {1, 2, 8}
    for run in ("ar-0", "denoise-1"):
        losses = json.loads((done / run / "eval" / "compare.json").read_text())["losses"]
        assert {len(values) for values in losses["nats_per_token"].values()} == {4}


def test_the_report_is_a_table_rows_and_pictures(done):
    table = (done / "compare.md").read_text()
    assert [line[0] for line in first_table(table)] == ["arm", "ar", "denoise"]
    assert "final loss" in table
    assert {row["kind"] for row in rows_of(done)} == {"figure", "cost", "difference", "equal", "reach", "gain"}
    for name in ("depth", "seconds", "tokens", "layer-forwards"):
        assert (done / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_samples_are_held_against_the_twin_of_the_seed_by_the_judge_of_the_next(done):
    figures = [row for row in rows_of(done) if row["kind"] == "figure" and row["arm"] == "denoise"]
    judged = [row for row in figures if row["metric"] == "judged_behind_twin"]
    assert {(row["seed"], row["twin"], row["by"]) for row in judged} == {(0, "ar, seed 0", "ar, seed 1"),
                                                                         (1, "ar, seed 1", "ar, seed 0")}
    read = [row for row in figures if row["metric"] == "twin_judged_nats"]
    assert {(row["seed"], row["by"]) for row in read} == {(0, "ar, seed 1"), (1, "ar, seed 0")}
    assert "distinct-2 there" in (done / "compare.md").read_text()


def test_the_same_command_again_trains_and_evaluates_nothing(done, copy, command, capsys):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.parent.name in ("eval", "checkpoints")}
    report = (done / "compare.md").read_text()
    assert main([*command, "--out", str(copy)]) == 0
    shown = capsys.readouterr().out
    assert "4 of 4 runs are trained already" in shown
    assert "evaluating" not in shown
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (copy / "compare.md").read_text() == report.replace(str(done), str(copy))


def test_only_what_is_missing_or_changed_is_done(copy, command, in_place, capsys):
    command = [*command, "--out", str(copy)]
    (copy / "denoise-1" / "eval" / "compare.json").write_text("{")
    assert main(command) == 0
    assert capsys.readouterr().out.count("evaluating") == 1
    assert main([*command, "--depths", "3", "--evaluation.num_sequences", "3"]) == 0
    assert capsys.readouterr().out.count("evaluating") == 4
    assert {row["n"] for row in rows_of(copy) if row.get("metric") == "nats_per_token"} == {3}
    shutil.rmtree(copy / "ar-1")
    with in_place():
        assert main(command) == 0
    shown = capsys.readouterr().out
    assert "3 of 4 runs are trained already" in shown
    assert "done: 8 steps" in shown


def test_what_was_held_against_a_baseline_is_evaluated_again_when_that_is_trained_anew(copy, command, in_place, capsys):
    for seed in (0, 1):
        shutil.rmtree(copy / f"ar-{seed}")
    command = [word.replace("ar,denoise", "ar=ar optim.lr=0.00001,denoise") for word in command]
    with in_place():
        assert main([*command, "--out", str(copy)]) == 0
    assert capsys.readouterr().out.count("evaluating denoise") == 2


@pytest.mark.parametrize(("changes", "why"), [
    (["--amount", "700"], "training.budget 500"),
    (["--model.width", "32"], "model.width 16"),
])
def test_another_comparison_does_not_overwrite_a_finished_one(copy, command, changed, changes, why, capsys):
    assert main([*changed(command, changes), "--out", str(copy)]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert "--out" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("arguments", "why"), [
    (["--budget", "tokens"], "--amount"),
    (["--budget", "steps", "--amount", "5"], "--budget"),
    (["--amount", "5"], "--budget"),
    (["--budget", "tokens", "--amount", "0"], "--amount 0"),
    (["--budget", "tokens", "--amount", "5", "--seeds", "0"], "--seeds 0"),
    (["--budget", "tokens", "--amount", "5", "--jobs", "0"], "--jobs 0"),
    (["--budget", "tokens", "--amount", "5", "--objectives", "ar,denois"], "did you mean 'denoise'"),
    (["--budget", "tokens", "--amount", "5", "--depths", "x"], "--depths"),
    (["--budget", "tokens", "--amount", "5", "--out", "CONFIG"], "choose another --out"),
    (["--budget", "tokens", "--amount", "5", "--data.path", ".", "--out", "a/b"], "a/b is in ., where"),
])
def test_bad_input_is_one_sentence_and_nothing_is_trained(arguments, why, tiny_yaml, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(tiny_yaml), *[str(tiny_yaml) if word == "CONFIG" else word for word in arguments]]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.startswith("looped: ")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_amount_is_the_configs_own_where_the_unit_is():
    config = load_config(None, {"training.budget": 77, "training.budget_unit": "seconds"})
    settings = {"num_seeds": 1, "depths": None, "out": Path("out")}
    assert make_plan(config, "ar", budget=("seconds", None), **settings).amount == 77
    assert make_plan(config, "ar", budget=("seconds", 5), **settings).arms[0].config.training.budget == 5
    with pytest.raises(UserError, match="--amount"):
        make_plan(config, "ar", budget=("tokens", None), **settings)


def test_an_arm_that_fails_is_told_in_its_own_words_and_the_others_are_reported(copy, tiny_yaml, capsys):
    code = main(["compare", str(tiny_yaml), "--objectives", "ar optim.lr=1e30 optim.grad_clip=0,ar", "--budget",
                 "tokens", "--amount", "500", "--seeds", "1", "--out", str(copy)])
    said = capsys.readouterr()
    assert code == 2
    assert said.err.startswith("looped: ar optim.lr=1e30 optim.grad_clip=0, seed 0: the ")
    assert "try a lower optim.lr" in said.err
    assert said.err.count("\n") == 1
    assert [row["arm"] for row in rows_of(copy) if row["kind"] == "cost"] == ["ar"]


def test_ctrl_c_saves_the_runs_ends_with_130_and_the_same_command_would_go_on(tiny_yaml, tmp_path):
    command = [sys.executable, "-m", "looped.cli", "compare", str(tiny_yaml), "--objectives", "ar,truncated",
               "--budget", "seconds", "--amount", "3000", "--seeds", "1", "--jobs", "2", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0)
    runs = [tmp_path / "out" / name for name in ("ar-0", "truncated-0")]
    try:
        deadline = time.monotonic() + 120
        while not all((run / "metrics.jsonl").exists() for run in runs):
            assert time.monotonic() < deadline, process.poll()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to the whole group
        shown, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in shown
    for run in runs:
        assert "SIGINT: stopped after step" in (run / "train.log").read_text()
        assert (run / "latest").exists()
    plan = make_plan(load_config(tiny_yaml), "ar,truncated", budget=("seconds", 3000), num_seeds=1, depths=None,
                     out=tmp_path / "out")
    assert not any(map(is_finished, plan.places))


def test_a_run_that_is_killed_is_said_to_lack_memory(tiny_yaml, tmp_path):
    plan = make_plan(load_config(tiny_yaml), "ar", budget=("tokens", 500), num_seeds=1, depths=None, out=tmp_path)
    write_configs(plan)
    told, others = [], psutil.Process().children()

    def say(line):
        told.append(line)
        if line.startswith("training"):
            (child,) = (child for child in psutil.Process().children() if child not in others)
            child.kill()

    result = train_all(plan, say=say)
    assert result.finished == []
    assert "lack of memory" in result.failures["ar, seed 0"]
    assert "lack of memory" in told[-1]


# ---- its report


def by_hand(out, arm, unit, spent):
    """The losses of an arm's seeds, from the runs' own files."""
    values = []
    for seed in range(2):
        lines = map(json.loads, (out / f"{arm}-{seed}/metrics.jsonl").read_text().splitlines())
        points = [(each[unit], each["next_token"]) for each in lines if each["kind"] == "heldout"]
        values += [before + (spent - low) / (high - low) * (after - before)
                   for (low, before), (high, after) in pairwise(points) if low < spent <= high]
    return values


def test_a_real_comparison_holds_it_in_its_rows_its_table_and_its_page(done):
    rows = [json.loads(line) for line in (done / "compare.jsonl").read_text().splitlines()]
    equal = {(row["arm"], row["budget"]): row for row in rows if row["kind"] == "equal"}
    assert len(equal) == 2 * 3
    for arm in ("ar", "denoise"):
        row = equal[arm, "tokens"]
        values = by_hand(done, arm, "tokens", row["spent"])
        assert (row["spent"], row["num"]) == (512, 2)
        assert (row["mean"], row["sd"]) == (pytest.approx(fmean(values)), pytest.approx(stdev(values)))
    table = next(part for part in (done / "compare.md").read_text().split("\n\n") if "after 512 tokens" in part)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert all(cell for line in cells for cell in line)
    assert [line[0] for line in cells[2:]] == ["ar", "denoise"]
    page = (done / "report.html").read_text()
    assert "<h2>At equal budgets</h2>" in page
    reader, _ = check_alone(page)
    assert all(cell in reader.text for line in (cells[0], *cells[2:]) for cell in line)


def test_a_real_report_is_alone(done):
    reader, pictures = check_alone((done / "report.html").read_text())
    assert len(pictures) == 5
    assert all(word in reader.text for word in ("nats/token", "torch", "denoise, seed 0, depth 2", "distinct-2"))
