"""`looped compare` on a task: the table by hand, a best depth that is not chosen where it is read, reach upwards."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
import yaml
from page_checks import first_table

from looped.cli import main
from looped.compare.accuracy_summary import summarise_shares
from looped.compare.accuracy_table import share_table
from looped.compare.compute_to_target import reaches, sentence, with_reverse
from looped.compare.curve import crossing
from looped.compare.plan import RunSpec
from looped.compare.task_measure import SHARE_SOLVED, TaskMeasured
from looped.config import load_config
from looped.config.arms import Arm, parse_arms
from looped.errors import UserError

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

TINY = {
    "task": {"name": "prefix-sums", "difficulty": [1, 4]},
    "model": {"width": 16, "num_heads": 2, "num_core_layers": 1}, "recurrence": {"mean": 2, "backprop": 1},
    "denoise": {"context": "inject", "cond_width": 8, "target": {"dim": 4}},
    "optim": {"lr": 0.01, "warmup_steps": 2},
    "training": {"budget": 8, "batch_size": 8, "threads": 1, "log_every": 3, "checkpoint_every": 2, "num_evals": 4},
    "evaluation": {"num_problems": 9, "depths": [1, 2], "difficulties": [2, 5]},
}
LEVELS = (2, 4, 5)  # 4 is the hardest that is trained


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The config, and the command but for where it goes."""
    path = tmp_path_factory.mktemp("task") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return ["compare", str(path), "--objectives", "truncated,denoise", "--budget", "layer-forwards", "--amount", "1800",
            "--seeds", "2"]


@pytest.fixture(scope="module")
def done(tiny, in_place):
    """A finished comparison."""
    out = Path(tiny[1]).parent / "done"
    with in_place():
        assert main([*tiny, "--out", str(out), "--jobs", "2"]) == 0
    return out


@pytest.fixture
def copy(done, tmp_path):
    """One that a test may change."""
    return shutil.copytree(done, tmp_path / "copy", symlinks=True)


def rows_of(out):
    return [json.loads(line) for line in (out / "compare.jsonl").read_text().splitlines()]


def table_of(out):
    """Arm -> column -> cell of the first table of compare.md."""
    header, *lines = first_table((out / "compare.md").read_text())
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


def rights_of(out, arm):
    """Of each seed: level -> depth -> the list of problems solved, from the run's own file."""
    return [json.loads((out / f"{arm}-{seed}/eval/compare.json").read_text())["right"] for seed in range(2)]


def by_hand(rights, level, depth):
    """`mean ± sd (depth)` of the problems with odd numbers."""
    shares = [fmean(right[level][depth][1::2]) for right in rights]
    return f"{fmean(shares):.3f} ± {stdev(shares):.3f} ({depth})"


def best_by_hand(rights, level):
    def share(depth):
        return fmean(fmean(right[level][depth][0::2]) for right in rights)

    return max(sorted(rights[0][level], key=int), key=share)


def test_the_table_is_what_the_runs_own_files_give_by_hand(done):
    table = table_of(done)
    assert list(table) == ["truncated", "denoise"]
    first = rights_of(done, "truncated")
    for arm, trained in (("truncated", "2"), ("denoise", "1")):
        rights = rights_of(done, arm)
        for level in map(str, LEVELS):
            assert {len(right[level]["8"]) for right in rights} == {9}
            assert table[arm][f"{level}: trained depth"] == by_hand(rights, level, trained)
            assert table[arm][f"{level}: best depth"] == by_hand(rights, level, best_by_hand(rights, level))
            assert table[arm][f"{level}: deepest"] == by_hand(rights, level, "8")
            best, other = best_by_hand(rights, level), best_by_hand(first, level)
            gap = fmean(fmean(mine[level][best][1::2]) - fmean(theirs[level][other][1::2])
                        for mine, theirs in zip(rights, first, strict=True))
            cell = table[arm][f"{level}: against truncated"]
            assert cell == "-" if arm == "truncated" else math.isclose(float(cell.split()[0]), gap, abs_tol=5e-4)


def test_every_arm_has_its_budget_and_the_costs_are_those_of_its_training(done):
    table = table_of(done)
    for arm in ("truncated", "denoise"):
        last = [[json.loads(line) for line in (done / f"{arm}-{seed}/metrics.jsonl").read_text().splitlines()][-1]
                for seed in range(2)]
        assert all(1800 <= line["layer_forwards"] < 1800 + 100 for line in last)
        assert table[arm]["layer forwards"] == f"{fmean(line['layer_forwards'] for line in last):,.0f}"
        assert table[arm]["steps"] == f"{fmean(line['step'] for line in last):,.0f}"


def test_rows_pictures_and_the_page_are_left(done):
    rows = rows_of(done)
    assert {"figure", "cost", "share", "difference"} <= {row["kind"] for row in rows}
    figures = {(row["arm"], row["seed"], row["difficulty"], row["depth"]) for row in rows if row["kind"] == "figure"}
    assert len(figures) == 2 * 2 * len(LEVELS) * 3
    shares = [row for row in rows if row["kind"] == "share" and row["at"] == "best"]
    assert [(row["arm"], row["difficulty"]) for row in shares] == [
        (arm, level) for arm in ("truncated", "denoise") for level in LEVELS]
    for name in ("depth-4", "depth-5", "map", "seconds", "tokens", "layer-forwards"):
        assert (done / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (done / "report.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == page.count("<img") == 7
    assert "the same held-out problems" in page
    assert "chosen on one half of the 9 problems" in page
    assert "Samples" not in page


def test_the_same_command_again_does_nothing_and_other_levels_are_measured_alone(done, copy, tiny, capsys):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.parent.name in ("eval", "checkpoints")}
    report = (done / "compare.md").read_text()
    assert main([*tiny, "--out", str(copy)]) == 0
    shown = capsys.readouterr().out
    assert "4 of 4 runs are trained already" in shown
    assert "evaluating" not in shown
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (copy / "compare.md").read_text() == report.replace(str(done), str(copy))
    assert main([*tiny, "--out", str(copy), "--difficulties", "3,6", "--depths", "1,3"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("evaluating") == 4
    assert "4 of 4 runs are trained already" in shown
    assert {row["difficulty"] for row in rows_of(copy) if row["kind"] == "figure"} == {3, 4, 6}


@pytest.mark.parametrize(("changes", "why"), [
    (["--objectives", "truncated,denoise:concat"], "set denoise.context to inject"),
    (["--objectives", "truncated,truncated task.layout=causal"], "an arm cannot set task.layout"),
    (["--task.name", "sudoku", "--task.difficulty", "null", "--task.layout", "causal", "--objectives", "truncated,ar"],
     "task.layout causal does not fit sudoku"),
    (["--task.name", "sudoku", "--task.options", "{size: 4}", "--difficulties", "99"], "sudoku of size 4 ends at"),
    (["--difficulties", "0"], "prefix-sums begins at difficulty 1"),
    (["--difficulties", "x"], "--difficulties 'x'"),
    (["--evaluation.num_problems", "1"], "evaluation.num_problems 1"),
    (["--task.name", "null"], "--difficulties is for tasks"),
])
def test_what_does_not_apply_is_one_sentence_and_nothing_is_trained(tiny, changed, changes, why, tmp_path, monkeypatch,
                                                                    capsys):
    monkeypatch.chdir(tmp_path)
    text = ["--difficulties", "3"] if changes[-1] == "null" else []
    assert main(changed(tiny, [*changes, *text])) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.startswith("looped: ")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_arms_may_not_differ_in_the_task():
    with pytest.raises(UserError, match=r"an arm cannot set task\.options, which all arms share"):
        parse_arms(load_config(None, TINY_FLAGS), "truncated task.options={}")


# ---- figures made up -------------------------------------------------------------------------------------------------

TINY_FLAGS = {"task.name": "prefix-sums", "task.difficulty": [1, 4], "denoise.context": "inject", "recurrence.mean": 2}


def run(objective, seed, right, curve=((1, 0.1), (2, 0.2))):
    """A measured run: `right[depth]` which problems of difficulty 4 are solved; `curve` of (step, share)."""
    arm = Arm(objective, objective, load_config(None, TINY_FLAGS | {"objective": objective}), objective)
    place = RunSpec(arm, seed, Path(f"{objective}-{seed}"))
    lines = [{"step": step, "solved": share, "seconds": step / 2, "tokens": 10 * step, "layer_forwards": 100 * step}
             for step, share in curve]
    costs = {name: lines[-1].get(name, 0) for name in ("step", "tokens", "layer_forwards", "seconds", "peak_bytes")}
    solved = {4: {depth: torch.tensor(each, dtype=torch.float64) for depth, each in right.items()}}
    return TaskMeasured(place, [], costs, lines, solved)


def test_the_best_depth_is_chosen_on_the_other_half_than_the_one_that_is_reported():
    right = {1: [0, 0] * 4, 2: [1, 0, 1, 0, 1, 0, 1, 1], 8: [0, 1] * 4}  # 8 is best on the reported half, 2 elsewhere
    level = summarise_shares([run("truncated", 0, right)])[0].levels[4]
    assert level.at == {"trained": 2, "best": 2, "deepest": 8}
    assert level.shares[2].mean == 1 / 4
    assert level.shares[8].mean == 1


def test_several_trajectories_add_what_any_of_them_solves_and_the_cost_of_an_answer():
    """On the reported half, at the best depth; an arm with one trajectory has no such cell."""
    one = run("truncated", 0, {1: [1, 0, 1, 0], 2: [0, 0, 0, 0]})
    plain = run("full", 0, {1: [0, 0, 0, 0], 2: [0, 0, 0, 0]})
    several = replace(one, by_any={4: {1: torch.tensor([0.0, 1.0, 0.0, 0.0]), 2: torch.ones(4)}}, rows=[
        {"metric": "solved", "difficulty": 4, "depth": depth, "layer_forwards": 30.0 * depth} for depth in (1, 2)])
    arms = summarise_shares([several, plain])
    assert (arms[0].levels[4].tried.share.mean, arms[0].levels[4].tried.layer_forwards) == (0.5, 30.0)
    (row,) = [row for row in arms[0].rows() if row["kind"] == "by_any"]
    assert (row["depth"], row["mean"], row["layer_forwards"]) == (1, 0.5, 30.0)
    header, lines = (table := share_table(arms, None)).header, table.lines
    cells = [dict(zip(header, line, strict=True)) for line in lines]
    assert [each["4: any trajectory"] for each in cells] == ["0.500 (of 1)", "-"]
    assert [each["4: layer forwards per answer"] for each in cells] == ["30", "-"]
    assert "4: any trajectory" not in share_table(summarise_shares([one, plain]), None).header


def test_one_best_depth_for_all_seeds_of_an_arm_and_the_shallowest_of_equals():
    one = run("truncated", 0, {1: [0, 0, 0, 0], 2: [1, 0, 0, 0], 4: [1, 0, 1, 1]})
    two = run("truncated", 1, {1: [0, 0, 0, 0], 2: [1, 0, 1, 1], 4: [1, 0, 0, 0]})
    level = summarise_shares([one, two])[0].levels[4]
    assert level.at["best"] == 2
    assert (level.shares[2].mean, level.shares[2].num) == (0.25, 2)


def test_differences_are_of_each_arms_own_best_depth_and_paired_by_problem_and_seed():
    hard = torch.randint(2, (200,), generator=torch.Generator().manual_seed(0))
    gained = hard.clone()
    gained[1:40:2] = 1  # the first twenty of the reported half are solved besides
    first = [run("truncated", seed, {2: hard.tolist(), 8: [0] * 200}) for seed in range(2)]
    second = [run("denoise", seed, {1: [0] * 200, 8: gained.tolist()}) for seed in (1, 0)]
    level = summarise_shares([*first, *second])[1].levels[4]
    gap = (gained - hard)[1::2].double().mean().item()
    assert level.at["best"] == 8
    assert level.difference.mean == pytest.approx(gap)
    assert 0 < level.difference.ci_low < gap < level.difference.ci_high < 2 * gap
    assert (level.difference.to, level.difference.num_seeds, level.difference.sd) == ("truncated", 2, 0)


def test_a_share_is_reached_from_below_on_the_straight_line():
    curve = run("full", 0, {2: [1, 1]}, [(2, 0.1), (4, 0.5), (8, 0.4)]).curve
    assert crossing(curve, 0.3, SHARE_SOLVED) == {"seconds": 1.5, "tokens": 30, "layer_forwards": 300, "early": False}
    assert crossing(curve, 0.05, SHARE_SOLVED)["early"]
    assert crossing(curve, 0.6, SHARE_SOLVED) is None


def test_reach_says_who_was_there_first_and_the_reverse_where_an_arm_never_is():
    good = run("full", 0, {2: [1] * 16}, [(10, 0.2), (20, 0.6), (40, 0.8)])
    bad = run("denoise", 0, {1: [0] * 16}, [(10, 0.1), (20, 0.4)])
    arms = summarise_shares([good, bad])
    said = [sentence(each) for each in with_reverse(reaches(arms), arms)]
    assert said == [
        "denoise does not reach full's final share solved (0.800) (1 seed: spread between seeds unknown).",
        "full reaches denoise's final share solved (0.400) after 0.38 of its own training time, which is 0.75 of "
        "denoise's seconds, 0.75 of denoise's tokens and 0.75 of denoise's layer forwards (1 seed: spread between "
        "seeds unknown)."]
    assert reaches(arms)[0].as_dict()["share_solved"] == 0.8
    assert [sentence(each).split(" after")[0] for each in reaches(summarise_shares([bad, good]))] == [
        "full reaches denoise's final share solved (0.400)"]


def test_an_arm_that_solves_nothing_is_nothing_to_reach():
    nothing = run("full", 0, {2: [0, 0]}, [(10, 0.0), (20, 0.0)])
    assert reaches(summarise_shares([nothing, run("denoise", 0, {1: [0, 0]})])) == []
