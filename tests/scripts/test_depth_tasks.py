"""The table of rules by tasks: figures stand where they belong, no cell is blank, what is missing has its reason."""

import json
import sys
from pathlib import Path

import pytest

from looped.compare.budgets import LATER
from looped.config import load_config
from looped.config.arms import parse_arms

TINY = {"model.width": 24, "model.num_core_layers": 1, "recurrence.mean": 2, "recurrence.backprop": 1,
        "supervision.segments": 2, "fixed_point.max_steps": 4, "denoise.cond_width": 8, "training.batch_size": 8,
        "training.num_evals": 4, "evaluation.num_problems": 8, "evaluation.depths": [1, 3]}


@pytest.fixture
def script(load):
    return load("depth_tasks")


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """`run(compare, *arguments)`: the exit code and the text of the table, `compare` in the place of the process: it is
    given (names of arms, folder, the command), and returns (exit code, what is said on stderr)."""
    def go(compare, *arguments):
        def wait_for(command):
            options = dict(zip(command[5::2], command[6::2], strict=False))
            folder = Path(options["--out"])
            (folder / "logs").mkdir(parents=True, exist_ok=True)
            arms = parse_arms(load_config(None), options["--objectives"])
            return compare([arm.name for arm in arms], folder, command)

        monkeypatch.setattr(script, "wait_for", wait_for)
        monkeypatch.setattr(sys, "argv", ["depth_tasks", "--out", str(tmp_path / "out"), *arguments])
        code, path = script.main(), tmp_path / "out/depth_tasks.md"
        return code, path.read_text() if path.exists() else None

    return go


def made_up(arm, number, *, seeds=2, later=()):
    """Rows of an arm: 0.n1 and 0.n2 at equal seconds and layer forwards, 0.n3 and 0.n4 beyond training."""
    equal = {"kind": "equal", "arm": arm, "sd": 0.05, "num": seeds}
    rows = [{"kind": "cost", "arm": arm, "seed": seed} for seed in range(seeds)]
    for place, (budget, spent) in enumerate([("seconds", 60.0), ("tokens", 7.0), ("layer_forwards", 5000.0)]):
        row = equal | {"budget": budget, "spent": spent, "mean": number / 10 + (0.01, 0.09, 0.02)[place]}
        if budget in later:
            row = {name: value for name, value in row.items() if name not in ("mean", "sd")} | {"num": 0}
        rows.append(row)
    for level in (16, 32, 64):
        rows += [{"kind": "share", "arm": arm, "difficulty": level, "at": at, "depth": depth, "num": seeds,
                  "mean": number / 10 + level / 1000 + 0.003 * (at == "deepest"), "sd": 0.0}
                 for at, depth in (("trained", 8), ("best", 4), ("deepest", 64))]
    return rows


def write(folder, rows):
    (folder / "compare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def all_well(arms, folder, command):
    write(folder, [row for number, arm in enumerate(arms, 1) for row in made_up(arm, number)])
    return 0, ""


def tables(text):
    """First column -> column -> cell, of each table; no cell is blank."""
    found = []
    for part in text.split("\n\n"):
        if part.startswith("|"):
            header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
            assert all(cell for line in lines for cell in line)
            found.append({line[0]: dict(zip(header, line, strict=True)) for line in lines})
    return found


@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_every_rule_applies_to_every_task(script, tmp_path, scale):
    for task in script.TASKS:
        entry = script.make_entry(task, list(script.RULES), script.SCALES[scale], {}, tmp_path)
        assert dict(entry.refused) == {}
        assert list(entry.arms) == list(script.RULES)
        configs = [arm.config for arm in entry.arms.values()]
        assert len({config.model.width for config in configs}) == len({config.task.name for config in configs}) == 1


def test_figures_stand_under_their_rule_at_both_budgets(run):
    code, text = run(all_well, "--tasks", "prefix-sums,s5", "--rules", "full,denoise,ar", "--seeds", "2")
    assert code == 0
    main, sums, words = tables(text)
    assert list(main) == ["prefix-sums", "s5"]
    assert main["s5"] == {
        "task": "s5", "hardest trained": "factors 16", "seconds": "60", "layer forwards": "5,000",
        "full": "0.110 ± 0.050; 0.120 ± 0.050", "denoise": "0.210 ± 0.050; 0.220 ± 0.050",
        "ar": "0.310 ± 0.050; 0.320 ± 0.050"}
    assert list(sums["full"]) == ["rule", "32: best depth", "32: deepest", "64: best depth", "64: deepest"]
    assert words["denoise"]["32: best depth"] == "0.232 ± 0.000 (4)"
    assert words["denoise"]["64: deepest"] == "0.267 ± 0.000 (64)"


def test_what_was_measured_later_and_what_has_nothing_harder_is_said(run):
    def compare(arms, folder, command):
        write(folder, [row for row in made_up(arms[0], 1, later=["layer_forwards"])
                       if row.get("difficulty") in (None, 16)])
        return 0, ""

    _, text = run(compare, "--tasks", "prefix-sums", "--rules", "full", "--seeds", "2")
    assert tables(text)[0]["prefix-sums"]["full"] == f"0.110 ± 0.050; {LATER}"
    assert "prefix-sums: nothing harder than what was trained has been measured." in text


def test_a_rule_that_a_setting_refuses_is_not_trained_and_has_a_footnote(run):
    asked = []

    def compare(arms, folder, command):
        asked.append((folder.name, arms))
        return all_well(arms, folder, command)

    code, text = run(compare, "--tasks", "parity,sudoku4,nary-addition", "--rules", "denoise,k-step,full",
                     "--seeds", "2", "--task.layout", "causal", "--evaluation.difficulties=[32]")
    assert code == 0
    assert asked == [("parity", ["k-step", "full"]), ("nary-addition", ["k-step", "full"])]
    main = tables(text)[0]
    assert main["parity"]["denoise"] == main["nary-addition"]["denoise"] == "[1]"
    assert main["nary-addition"]["k-step"].startswith("0.110")
    assert set(main["sudoku4"].values()) == {"sudoku4", "[2]"}
    assert tables(text)[1]["denoise"]["32: deepest"] == "[1]"
    assert "[1] does not apply: denoise.order confidence settles the cells of a task one after another" in text
    assert "[2] does not apply: task.layout causal does not fit sudoku" in text
    assert "[3]" not in text


def test_runs_that_failed_are_told_in_their_own_words_and_the_next_task_is_done(run):
    def compare(arms, folder, command):
        if folder.name == "s5":
            return all_well(arms, folder, command)
        write(folder, made_up(arms[0], 1, seeds=1))
        (folder / "logs" / "full-1.log").write_text("step 1\nlooped: the loss is not finite\n")
        (folder / "logs" / "ar-0.log").write_text("Killed\n")
        return 2, "looped: full, seed 1: the loss is not finite\n"

    code, text = run(compare, "--tasks", "prefix-sums,s5", "--rules", "full,ar", "--seeds", "2")
    assert code == 2
    main = tables(text)[0]
    assert main["prefix-sums"]["full"].endswith("; 0.120 ± 0.050 [1]")
    assert main["prefix-sums"]["ar"] == "[2]"
    assert "[1]" not in main["s5"]["full"]
    assert "[1] 1 of 2 seeds have finished: the loss is not finite" in text
    assert "[2] 0 of 2 seeds have finished: see " in text


def test_figures_of_an_earlier_comparison_are_not_taken_for_one_that_is_refused(run):
    run(all_well, "--tasks", "s5", "--rules", "full", "--seeds", "2")
    refused = (2, "looped: OUT was started with training.budget 300; choose another --out\n")
    code, text = run(lambda *_: refused, "--tasks", "s5", "--rules", "full", "--seeds", "2", "--seconds", "5")
    assert code == 2
    assert tables(text)[0]["s5"] == {"task": "s5", "hardest trained": "factors 16", "seconds": "[1]",
                                     "layer forwards": "[1]", "full": "[1]"}
    assert "[1] no run has finished: OUT was started with training.budget 300" in text


def test_what_is_stopped_goes_no_further(run):
    asked = []
    code, text = run(lambda arms, folder, _: (asked.append(folder.name), (130, ""))[1], "--tasks", "s5,a5")
    assert (code, text, asked) == (130, None, ["s5"])


def test_the_command_has_the_settings_of_the_task_below_those_of_the_user(run):
    commands = []

    def compare(arms, folder, command):
        commands.append(command)
        return all_well(arms, folder, command)

    run(compare, "--tasks", "sudoku4", "--rules", "truncated", "--seconds", "7", "--jobs", "1", "--model.width=32",
        "--evaluation.depths", "[1, 5]", "--seeds", "2")
    (command,) = commands
    assert {"--task.name=sudoku", '--task.options={"size": 4}', "--task.difficulty=null"} < {*command}
    assert [word for word in command if word.startswith("--model.width")] == ["--model.width=32"]
    options = dict(zip(command[5::2], command[6::2], strict=False))
    assert (options["--amount"], options["--depths"], options["--jobs"]) == ("7", "1,4,10,20,40", "1")
    assert "--evaluation.depths=[1, 5]" in command  # those of the curves; the table has the task's own
    assert options["--objectives"].startswith("truncated=truncated model.state_init=zero")


@pytest.mark.parametrize(("arguments", "why"), [
    (["--tasks", "mase"], "did you mean 'maze'"), (["--rules", "denoize"], "did you mean 'denoise'"),
    (["--model.widht", "3"], "did you mean 'width'"), (["--second", "3"], "neither an option of this script"),
    (["--optim.lr", "1e-3"], "--optim.lr 1e-3 would be lost")])
def test_bad_input_is_one_sentence_and_nothing_is_trained(run, arguments, why, capsys):
    code, text = run(all_well, *arguments)
    assert (code, text) == (2, None)
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_real_run_of_one_task_fills_every_cell_and_goes_on(script, tmp_path, monkeypatch, capfd):
    flags = [f"--{name}={json.dumps(value)}" for name, value in TINY.items()]
    monkeypatch.setattr(sys, "argv", ["depth_tasks", "--out", str(tmp_path), "--tasks", "sudoku4", "--seconds", "2",
                                      "--seeds", "1", *flags])
    assert script.main() == 0
    text = (tmp_path / "depth_tasks.md").read_text()
    main, beyond = tables(text)
    assert list(main["sudoku4"])[4:] == list(beyond) == list(script.RULES)
    assert "[1]" not in text
    capfd.readouterr()
    assert script.main() == 0
    assert "8 of 8 runs are trained already" in capfd.readouterr().out
    assert (tmp_path / "depth_tasks.md").read_text() == text
