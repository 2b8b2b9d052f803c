"""The depth report is one page that says what was measured, opens without a network, and has its pictures inside."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from page_checks import check_alone, measured

from looped.config import load_config
from looped.data.task import find_task
from looped.data.task_data import prepare_task
from looped.evaluation.metric_rows import Row, summarise
from looped.evaluation.options import Options
from looped.evaluation.plots_tasks import Trained, plot_levels, plot_map, plot_problem
from looped.evaluation.solving import Example, evaluate_task
from looped.evaluation.stability import Stability, stability
from looped.inference.exits import Exit
from looped.models.build import build
from looped.objectives import build_objective
from looped.reports.depth import DepthReport, write_depth_report

EVIL = "<script>alert(1)</script> & \"quoted\" $title ${x} http://example.org </pre>"
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
BEST = {6: 0.99, 8: 0.96, 10: 0.9, 11: 0.0}
FACTS = {"task": "sudoku 4 x 4", "rule": "denoise", "step": "2,000", "training": "640,000 tokens"}
TRAINED = Trained(depths=(4, 12), difficulties=(10, 10))


def rising(best, depth):
    """Saturates: within a hundredth at 16 steps."""
    return best * (1 - np.exp(-0.3 * depth))


def made_up(**changes) -> DepthReport:
    """A report of a run that was never trained: sudoku whose curves rise, and one that is never solved."""
    threshold = torch.rand(256, generator=torch.Generator().manual_seed(0))
    right = {level: {depth: threshold < rising(best, depth) for depth in DEPTHS} for level, best in BEST.items()}
    rows = [summarise(metric, each.double(), depth=depth, difficulty=level, layer_forwards=2.0 + 2 * depth)
            for level, by_depth in right.items() for depth, each in by_depth.items() for metric in ("solved", "cells")]
    task = find_task("sudoku")
    problem = task.problem(0, 0, 10, heldout=True)
    return replace(DepthReport("night", FACTS, "empty cells", TRAINED, rows, right, stability=[at_rest(10)],
                               exits=exits(), example=Example(task, problem, problem.targets, 10, 16)), **changes)


def at_rest(level) -> Stability:
    steps = range(1, 17)
    rows = [Row(metric, 0.8**step, 0.7**step, 0.9**step, 64, depth=step) for step in steps
            for metric in ("latent_change", "contraction")]
    rows += [summarise(name, torch.full((64,), 0.75)) for name in ("same_answer", "latent_cosine", "latent_distance")]
    return Stability("state", "other noise", 16, level, rows, torch.zeros(16, 64, 3, dtype=torch.long))


def exits() -> list[Row]:
    fields = {"depth": 64, "difficulty": 10, "by": "kl=0.001"}
    return [Row("solved_with_exit", 0.88, 0.84, 0.92, 256, **fields), Row("steps_used", 9.4, 9.0, 9.8, 256, **fields),
            Row("lost_by_exit", 0.02, 0.0, 0.04, 256, **fields)]


def written(folder, report) -> str:
    write_depth_report(folder, report)
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def page(folder):
    return written(folder, made_up())


def test_the_page_is_alone_and_has_all_pictures(page):
    _, pictures = check_alone(page)
    assert len(pictures) == 4


@pytest.mark.parametrize("said", [
    "night: sudoku 4 x 4 over depth and difficulty", "denoise after 2,000 steps", "640,000 tokens",
    "trained at empty cells 10 and depth 4 to 12, evaluated at empty cells 6 to 11",
    "empty cells 11: never: 0.00 solved at its best depth 1, not distinguishable from chance",
    "empty cells 10 (trained): improves: rises from 0.", "which is right", "9.4 of 64", "0.900", "shrink",
    "each is 0.06 of the one before", "95 % of the gain by", "flat: the means lie within 0.000",
])
def test_the_page_and_the_markdown_say_what_was_measured(page, folder, said):
    reader, _ = check_alone(page)
    assert said in reader.text
    assert said in (folder / "report.md").read_text()


def test_the_markdown_links_to_the_pictures_beside_it(page, folder):
    links = re.findall(r"!\[.*\]\((.*)\)", (folder / "report.md").read_text())
    assert links == ["plots/map.png", "plots/levels.png", "plots/rest.png", "plots/problem.png"]
    assert all((folder / link).is_file() for link in links)


def test_what_was_not_measured_has_no_section(tmp_path, page):
    bare = written(tmp_path, made_up(stability=(), exits=(), example=None))
    _, pictures = check_alone(bare)
    assert len(pictures) == 2
    for heading in ("Convergence and path independence", "Early exit", "An example problem"):
        assert heading in page
        assert heading not in bare


def test_one_depth_has_no_change_to_draw(tmp_path):
    """A solve of one step comes to no rest: the section is there without its picture."""
    still = replace(at_rest(10), rows=[row for row in at_rest(10).rows if row.depth is None])
    write_depth_report(tmp_path, made_up(stability=[still]))
    assert "Convergence and path independence" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "plots" / "rest.png").exists()


def test_answers_by_step_decide_whether_a_curve_cycles(tmp_path):
    turning = replace(at_rest(6), answers=(torch.arange(16) % 2)[:, None, None].expand(16, 64, 3).contiguous())
    text = written(tmp_path, made_up(stability=[turning]))
    assert "empty cells 6: cycles: 1.00 [1.00, 1.00] of 64 problems" in text


def test_words_are_shown_as_they_are(tmp_path):
    facts = FACTS | {"task": EVIL, EVIL: EVIL}
    reader, _ = check_alone(written(tmp_path, made_up(name=EVIL, facts=facts, difficulty=EVIL, exits=[
        replace(row, by=f"{EVIL}=1") for row in exits()])))
    assert reader.text.count(EVIL) > 10


def test_a_browser_shows_every_picture_and_nothing_sticks_out_on_a_phone(page, tmp_path, chromium):
    widths, wide = measured(chromium, page, tmp_path)
    assert len(widths) == 4
    assert all(width > 300 for width in widths)
    assert wide <= 0


@pytest.mark.parametrize("objective", ["full", "denoise"])
def test_a_real_run_fills_the_page(tmp_path, objective):
    config = load_config(None, {
        "task.name": "prefix-sums", "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "objective":
        objective, "denoise.cond_width": 8, "denoise.target.dim": 4, "denoise.context": "inject", "recurrence.mean": 3,
        "evaluation.num_problems": 4, "evaluation.batch_size": 4})
    data = prepare_task(config.task)
    run = build_objective(config, build(config, data.vocab_size))
    result = evaluate_task(run, data, config, [1, 2, 4], Options(difficulties=[3, 5], exits=[Exit.parse("kl=0.1")]))
    text = written(tmp_path, made_up(
        difficulty=data.task.difficulty, rows=result.solved.rows, per_example=result.solved.per_example,
        exits=result.exits, stability=[stability(run, data, config, 4, level) for level in (3, 5)], example=None))
    reader, pictures = check_alone(text)
    assert len(pictures) == 3
    assert "kl0.1" in reader.text  # two cells beside each other
    assert "are too few to fit" in reader.text


# ---- pictures --------------------------------------------------------------------------------------------------------

def ink(path, colour):
    """Pixels of a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((abs(imread(path)[..., :3] - wanted) < 0.02).all(-1).sum())


@pytest.mark.parametrize(("name", "options", "level"), [
    ("sudoku", {}, 10), ("maze", {}, 9), ("prefix-sums", {}, 40), ("addition", {}, 5)])
def test_a_wrong_cell_is_marked_and_a_right_answer_has_no_mark(tmp_path, name, options, level):
    task = find_task(name, options)
    problem = task.problem(0, 0, level)
    plot_problem(task, problem, problem.targets, tmp_path / "right.png")
    wrong = problem.targets.copy()
    cell = np.flatnonzero(problem.scored)[0]
    wrong[cell] = next(token for token in (2, 1, 5) if token != wrong[cell])
    plot_problem(task, problem, wrong, tmp_path / "wrong.png")
    assert ink(tmp_path / "right.png", "#c1121f") == 0
    assert ink(tmp_path / "wrong.png", "#c1121f") > 20


def test_what_was_trained_is_framed_in_the_map_and_shaded_behind_the_curves(tmp_path):
    report = made_up()
    few, many = (replace(TRAINED, difficulties=ends) for ends in ((10, 10), (6, 11)))
    for name, trained in (("few", few), ("many", many)):
        plot_map(report.shares, trained, tmp_path / f"{name}.png", difficulty="empty cells")
    assert 0 < ink(tmp_path / "few.png", "#c25a00") < ink(tmp_path / "many.png", "#c25a00")
    between = Trained(depths=(5, 7), difficulties=(9, 9))  # nothing of it was measured
    plot_map(report.shares, between, tmp_path / "between.png", difficulty="empty cells")
    assert ink(tmp_path / "between.png", "#c25a00") > 0
    plot_levels([row for row in report.rows if row.metric == "solved"], TRAINED, tmp_path / "levels.png",
                difficulty="empty cells")
    assert ink(tmp_path / "levels.png", "#f9efe6") > 1000  # a tenth of the frame's colour on white
