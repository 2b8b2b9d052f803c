"""Pictures show every arm in its colour, over the range that all of its seeds have."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from looped.compare.comparison_kinds import TEXT
from looped.compare.plan import make_plan
from looped.compare.plots import TALLEST, budget_figures, curves
from looped.compare.text_summary import summarise_texts
from looped.config import load_config
from looped.evaluation.plots import COLOURS, colours


def test_curves_are_straight_lines_between_evaluations_over_what_all_seeds_have(made_up):
    runs = [made_up("ar", 0, [1.0], [(1, 5.0), (4, 2.0)]), made_up("ar", 1, [1.0], [(2, 4.0), (8, 1.0)])]
    grid, seeds = curves(summarise_texts(runs)[0], "tokens")
    assert (grid[0], grid[-1]) == (pytest.approx(20), pytest.approx(40))
    assert seeds[:, 0].tolist() == [pytest.approx(4), pytest.approx(4)]
    assert seeds[:, -1].tolist() == [pytest.approx(2), pytest.approx(3)]
    middle = np.searchsorted(grid, 30)
    assert seeds[0, middle] == pytest.approx(6 - grid[middle] / 10)


def test_a_run_with_one_evaluation_is_a_point(made_up):
    grid, seeds = curves(summarise_texts([made_up("ar", 0, [1.0], [(3, 5.0)])])[0], "seconds")
    assert (grid.tolist(), seeds.tolist()) == ([3.0], [[5.0]])


def inked(path, colour):
    wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return (abs(imread(path)[..., :3] - wanted) < 0.02).all(-1).sum() > 50


def draw(arms, out):
    budget_figures(arms, out)
    TEXT.depths(arms, make_plan(load_config(None), "ar", budget=("tokens", 5), num_seeds=2, depths=None, out=out))


def test_every_arm_is_drawn_in_one_colour_and_nothing_in_another(made_up, tmp_path):
    names = ("ar", "truncated", "denoise")
    draw(summarise_texts([made_up(name, seed, [4.0 + i], [(1, 6.0 + i), (9, 4.0 + i)])
                         for i, name in enumerate(names) for seed in range(2)]), tmp_path)
    for name in ("depth", "seconds", "tokens", "layer-forwards"):
        drawn = [inked(tmp_path / "plots" / f"{name}.png", colour) for colour in COLOURS[:4]]
        assert drawn == [True, True, True, False], name


@pytest.mark.parametrize("name", ["r", "truncated model.state_init=zero recurrence.loss_on=every optim.lr="])
@pytest.mark.parametrize("num", [1, 8])
def test_the_legend_covers_neither_curves_nor_titles_and_lies_in_the_picture(made_up, tmp_path, monkeypatch, name, num):
    kept = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: kept.append(figure))
    runs = [made_up("ar", 0, [4.0 + i]) for i in range(num)]
    draw([replace(arm, name=f"{name}{i}") for i, run in enumerate(runs) for arm in summarise_texts([run])], tmp_path)
    for figure in kept:
        FigureCanvasAgg(figure).draw()
        legend, (axes,) = figure.legends[0].get_window_extent(), figure.axes
        assert len(figure.legends[0].texts) == num
        assert not legend.overlaps(axes.get_tightbbox())
        assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1
        assert legend.y1 <= figure.bbox.y1
        assert axes.get_window_extent().height > 0.5 * 4.2 * figure.dpi  # however long the names are


def test_eight_arms_have_eight_colours():
    assert len(set(colours(8))) == 8


def test_an_arm_that_fails_does_not_flatten_the_others(made_up, tmp_path):
    good, bad = made_up("ar", 0, [3.0], [(1, 3.5), (9, 3.0)]), made_up("denoise", 0, [900.0], [(1, 900.0), (9, 950.0)])
    draw(summarise_texts([good, bad]), tmp_path)
    assert TALLEST * 3 < 900
    assert inked(tmp_path / "plots" / "tokens.png", COLOURS[0])
    rows = np.nonzero((abs(imread(tmp_path / "plots" / "tokens.png")[..., :3] - [
        int(COLOURS[0][i : i + 2], 16) / 255 for i in (1, 3, 5)]) < 0.02).all(-1))[0]
    assert np.ptp(rows) > 30  # the curve still falls over a part of the picture, and is not a line along its floor
