"""Plots of a comparison: quality over depth, and over each budget spent."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from looped.compare.curve import BUDGETS, UNITS, Metric, values_at
from looped.compare.plan import Plan
from looped.compare.summary import ArmSummary
from looped.evaluation.plots import colours, new_figure, over_depth
from looped.reports.sections import Figure

GRID = 200
TALLEST = 2.0
"""Upper limit of the loss axis, as a multiple of the lowest loss: one arm that fails does not flatten the others."""
LETTERS = 14
"""Letters of the legend per inch."""
LINE = 0.17
"""Height of one line of the legend, in inches."""
ByDepth = Callable[[ArmSummary], Mapping[int, Sequence[float]]]


def budget_figures(arms: Sequence[ArmSummary], out: Path) -> list[Figure]:
    """The gauge plotted over each of `BUDGETS`; an arm has the same colour in all plots."""
    gauge, found = arms[0].runs[0].gauge, []
    for unit in BUDGETS:
        path = picture(out, unit.replace("_", "-"))
        plot_budget(arms, unit, path)
        what = f"Held-out {gauge.name}{gauge.remark} over {UNITS[unit]} of training."
        found.append(Figure(path, what, f"Held-out {gauge.name} of each arm over {UNITS[unit]}"))
    return found


def picture(out: Path, name: str) -> Path:
    """The path of a plot; its folder is created."""
    (out / "plots").mkdir(exist_ok=True)
    return out / "plots" / f"{name}.png"


def depth_figure(arms: Sequence[ArmSummary], plan: Plan, caption: str, *, by_depth: ByDepth | None = None,
                 name: str = "depth", title: str = "") -> Figure:
    """A plot over depth of `by_depth(arm)`, depth -> one value per seed (`ArmSummary.seeds_by_depth` if None): the mean
    as a line, lowest to highest seed as a band."""
    figure, axes = new_figure()
    lines = [arm.seeds_by_depth() if by_depth is None else by_depth(arm) for arm in arms]
    for arm, line, colour in zip(arms, lines, colours(len(arms)), strict=True):
        _band(axes, list(line), np.array(list(line.values())).T, colour, arm.name, "o-")
    over_depth(axes, set().union(*lines))
    axes.set_title(title, fontsize=10)
    _save(figure, axes, path := picture(plan.out, name), arms[0].runs[0].depth_gauge)
    bands = " Lines are means over seeds; bands span the lowest to the highest seed." if plan.num_seeds > 1 else ""
    return Figure(path, f"{caption}.{bands}", caption)


def over_depths(caption: str) -> Callable[[Sequence[ArmSummary], Plan], list[Figure]]:
    """The `depths` of a `Kind` that has one plot over depth, with this caption."""
    return lambda arms, plan: [depth_figure(arms, plan, caption)]


def plot_budget(arms: Sequence[ArmSummary], unit: str, path: Path) -> None:
    """Plot the gauge over the amount of one budget spent."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    figure, axes = new_figure(4.8)
    for arm, colour in zip(arms, colours(len(arms)), strict=True):
        grid, seeds = curves(arm, unit)
        _band(axes, grid, seeds, colour, arm.name, "-" if len(grid) > 1 else "o")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(f"{UNITS[unit]} of training")
    _save(figure, axes, path, arms[0].runs[0].gauge)


def curves(arm: ArmSummary, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """(grid, the gauge of each seed on it): linear between evaluations, over the range that all seeds cover."""
    low, high = max(run.curve[0][unit] for run in arm.runs), min(run.curve[-1][unit] for run in arm.runs)
    grid = np.geomspace(low, high, GRID) if low < high else np.array([high])
    return grid, np.array([values_at(run.curve, unit, grid, run.gauge) for run in arm.runs])


def _band(axes, x, seeds: np.ndarray, colour: str, label: str, style: str) -> None:
    axes.plot(x, seeds.mean(0), style, color=colour, markersize=4, label=label)
    if len(seeds) > 1:
        axes.fill_between(x, seeds.min(0), seeds.max(0), color=colour, alpha=0.18, linewidth=0)


def _save(figure, axes, path: Path, gauge: Metric) -> None:
    axes.set_ylim(*_limits(axes, gauge))
    axes.set_ylabel(gauge.axis)
    finish(figure, axes, path)


def finish(figure: Any, axes: Any, path: Path) -> None:
    """Draw the grid and the legend of a plot, if something in it has a label, and save it."""
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        _legend(figure, axes)
    figure.savefig(path)


def _legend(figure, axes) -> None:
    """Draw the legend above the axes, where it covers no curve, and make the figure taller by its height. It has as
    many columns as fit, with long names wrapped."""
    handles, names = axes.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    names = [textwrap.fill(name, int(LETTERS * (width - 1))) for name in names]
    longest = max(len(line) for name in names for line in name.splitlines())
    columns = min(max(int(width / (0.7 + longest / LETTERS)), 1), len(names))
    figure.set_figheight(height + LINE * sum(1 + name.count("\n") for name in names) / columns)
    figure.legend(handles, names, ncols=columns, loc="outside upper center", frameon=False, fontsize=8)


def _limits(axes, gauge: Metric) -> tuple[float, float]:
    """Limits of the y axis: 0 to 1 for fractions; for losses, cut off at `TALLEST`."""
    if gauge.higher_is_better:
        return -0.03, 1.03
    bottom, top = axes.get_ylim()  # includes the bands
    return bottom, min(top, TALLEST * min(line.get_ydata().min() for line in axes.lines))
