"""Progress through training: the metric after parts of the budget, and the budget at which a milestone is reached."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from looped.compare.accuracy_summary import summarise_shares
from looped.compare.comparison_kinds import TASK
from looped.compare.plan import RunSpec, make_plan
from looped.compare.progress import FRACTIONS, progress, progress_sections, reached
from looped.compare.report import write_report
from looped.compare.task_measure import SHARE_SOLVED, TaskMeasured
from looped.config import load_config
from looped.config.arms import Arm

FLAGS = {"task.name": "prefix-sums", "task.difficulty": [1, 4], "denoise.context": "inject", "recurrence.mean": 2}
SOLVED = torch.ones(8, dtype=torch.float64)


@pytest.fixture
def plan(tmp_path):
    return make_plan(load_config(None, FLAGS), "full,denoise", budget=("seconds", 16), num_seeds=2, depths=[2],
                     out=tmp_path)


def run(objective, seed, curve):
    """A measured run with a curve of (seconds, share solved), evaluated every ten steps."""
    arm = Arm(objective, objective, load_config(None, FLAGS | {"objective": objective}), objective)
    lines = [{"step": step, "solved": share, "seconds": seconds, "tokens": step, "layer_forwards": 10 * step}
             for step, (seconds, share) in zip(range(10, 1000, 10), curve, strict=False)]
    costs = {name: lines[-1].get(name, 0) for name in ("step", "tokens", "layer_forwards", "seconds", "peak_bytes")}
    return TaskMeasured(RunSpec(arm, seed, Path(f"{objective}-{seed}")), [], costs, lines, {4: {1: SOLVED, 2: SOLVED}})


@pytest.fixture
def arms():
    """`full` passes a half between 4 and 8 seconds on one seed alone; `denoise` starts above it on both, after 2."""
    return summarise_shares([
        run("full", 0, [(2, 0.0), (4, 0.2), (8, 1.0), (16, 1.0)]), run("full", 1, [(2, 0.0), (16, 0.4)]),
        run("denoise", 0, [(2, 0.6), (16, 0.9)]), run("denoise", 1, [(2, 0.8), (16, 0.96)])])


def test_the_metric_after_part_of_the_budget_lies_on_the_line_between_evaluations(arms, plan):
    found = progress(arms, plan)
    assert list(found) == list(FRACTIONS)[1:]  # at a tenth no arm was measured
    full, denoise = found[1 / 2]
    assert (full.spent, full.budget) == (8, "seconds")
    assert full.value.mean == pytest.approx((1.0 + 0.4 * 6 / 14) / 2)
    assert denoise.value.mean == pytest.approx((0.6 + 0.3 * 6 / 14 + 0.8 + 0.16 * 6 / 14) / 2)


def test_before_its_first_evaluation_an_arm_has_no_value(plan):
    late, early = run("full", 0, [(8, 0.5), (16, 1.0)]), run("denoise", 0, [(1, 0.6), (16, 0.9)])
    full, denoise = progress(summarise_shares([late, early]), plan)[0.1]
    assert full.value is None
    assert denoise.value.num == 1


def test_an_evaluation_one_step_late_is_that_after_a_part_of_the_budget(plan):
    (full,) = progress(summarise_shares([run("full", 0, [(1.7, 0.5), (16, 1.0)])]), plan)[0.1]
    assert (full.spent, full.value.mean) == (1.6, 0.5)


def test_a_milestone_counts_the_seeds_that_reach_it(arms, plan):
    found = {(each.arm, each.milestone): each for each in reached(arms, plan)}
    half = found["full", 0.5]
    assert (half.spent.mean, half.spent.num, half.num_seeds, half.early) == (pytest.approx(5.5), 1, 2, False)
    assert half.cell == "5.5 (1 of 2 seeds)"
    assert found["denoise", 0.5].cell == "at most 2 ± 0"
    assert found["denoise", 0.95].spent.num == 1
    assert found["full", 0.95].cell == "7.75 (1 of 2 seeds)"
    none = reached(summarise_shares([run("full", 0, [(1, 0.0), (2, 0.1)])]), plan)
    assert [each.cell for each in none] == ["not reached"] * len(SHARE_SOLVED.milestones)


def test_the_unit_is_that_of_the_budget(arms, tmp_path):
    plan = make_plan(load_config(None, FLAGS), "full,denoise", budget=("layer-forwards", 400), num_seeds=2, depths=[2],
                     out=tmp_path)
    half = next(each for each in reached(arms, plan) if (each.arm, each.milestone) == ("full", 0.5))
    assert (half.budget, half.spent.mean) == ("layer_forwards", pytest.approx(100 * (2 + 0.3 / 0.8)))


def test_the_report_has_the_table_and_the_rows(arms, plan):
    said = write_report(plan, TASK, [run for arm in arms for run in arm.runs])
    table = said.split("## Progress through training")[1].split("##")[0]
    assert "seconds to 0.95" in table
    assert "5.5 (1 of 2 seeds)" in table
    rows = [json.loads(line) for line in (plan.out / "compare.jsonl").read_text().splitlines()]
    assert {row["fraction"] for row in rows if row["kind"] == "progress"} == set(FRACTIONS[1:])
    kept = [row for row in rows if row["kind"] == "reached" and row["milestone"] == 0.9]
    assert [(row["arm"], row["num"], row.get("mean")) for row in kept] == [
        ("full", 1, pytest.approx(7.5)), ("denoise", 2, pytest.approx((16 + 2 + 14 * 0.1 / 0.16) / 2))]


def test_a_metric_without_milestones_has_no_table(arms, plan, monkeypatch):
    assert progress_sections(arms, plan)
    monkeypatch.setattr(TaskMeasured, "gauge", replace(SHARE_SOLVED, milestones=()))
    assert progress_sections(arms, plan) == []
