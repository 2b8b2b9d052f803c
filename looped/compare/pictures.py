"""The pictures of a comparison: quality over depth, and over what has been spent."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from looped.compare.curve import BUDGETS, UNITS, Gauge, values_at
from looped.compare.html import Figure
from looped.compare.plan import Plan
from looped.compare.summary import ArmSummary
from looped.evaluation.plots import COLOURS

GRID = 200
TALLEST = 2.0
"""A picture ends at this multiple of its lowest loss, so that one arm that fails does not flatten the others."""


def budget_figures(arms: Sequence[ArmSummary], out: Path) -> list[Figure]:
    """The gauge over what has been spent, drawn for each of `BUDGETS`; every arm has one colour in all pictures."""
    gauge, found = arms[0].runs[0].gauge, []
    for unit in BUDGETS:
        path = picture(out, unit.replace("_", "-"))
        plot_budget(arms, unit, path)
        what = f"Held-out {gauge.name}{gauge.remark} over {UNITS[unit]} of training."
        found.append(Figure(path, what, f"Held-out {gauge.name} of each arm over {UNITS[unit]}"))
    return found


def picture(out: Path, name: str) -> Path:
    """The file of a picture, in its folder."""
    (out / "plots").mkdir(exist_ok=True)
    return out / "plots" / f"{name}.png"


def band_note(plan: Plan) -> str:
    """What the lines and bands are."""
    return "" if plan.num_seeds == 1 else " Lines are means over seeds, bands go from the lowest seed to the highest."


def plot_depths(arms: Sequence[ArmSummary], by_depth: Callable[[ArmSummary], Mapping[int, Sequence[float]]],
                path: Path, *, title: str = "") -> None:
    """A figure over depth, of `by_depth(arm)[depth]` a figure a seed: the mean, from lowest to highest seed shaded."""
    figure, axes = _figure(7.0)
    lines = [by_depth(arm) for arm in arms]
    for arm, line, colour in zip(arms, lines, _colours(arms), strict=True):
        _band(axes, list(line), np.array(list(line.values())).T, colour, arm.name, "o-")
    ticks = sorted(set().union(*lines))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("depth (loop steps, or solver steps of a denoiser)")
    axes.set_title(title, fontsize=10)
    _save(figure, axes, path, arms[0].runs[0].gauge)


def plot_budget(arms: Sequence[ArmSummary], unit: str, path: Path) -> None:
    """The gauge over what has been spent of one budget."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    figure, axes = _figure(4.8)
    for arm, colour in zip(arms, _colours(arms), strict=True):
        grid, seeds = curves(arm, unit)
        _band(axes, grid, seeds, colour, arm.name, "-" if len(grid) > 1 else "o")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(f"{UNITS[unit]} of training")
    _save(figure, axes, path, arms[0].runs[0].gauge)


def curves(arm: ArmSummary, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """(grid, the gauge of each seed on it): straight lines between evaluations, over the range all seeds have."""
    low, high = max(run.curve[0][unit] for run in arm.runs), min(run.curve[-1][unit] for run in arm.runs)
    grid = np.geomspace(low, high, GRID) if low < high else np.array([high])
    return grid, np.array([values_at(run.curve, unit, grid, run.gauge) for run in arm.runs])


def _band(axes, x, seeds: np.ndarray, colour: str, label: str, style: str) -> None:
    axes.plot(x, seeds.mean(0), style, color=colour, markersize=4, label=label)
    if len(seeds) > 1:
        axes.fill_between(x, seeds.min(0), seeds.max(0), color=colour, alpha=0.18, linewidth=0)


def _figure(width: float):
    """A figure without pyplot, which keeps global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.2), dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def _colours(arms: Sequence[ArmSummary]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(arms))]


def _save(figure, axes, path: Path, gauge: Gauge) -> None:
    axes.set_ylim(*_limits(axes, gauge))
    axes.set_ylabel(gauge.axis)
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _limits(axes, gauge: Gauge) -> tuple[float, float]:
    """All shares there are; of losses, not those of an arm that fails."""
    if gauge.higher_is_better:
        return -0.03, 1.03
    low = min(line.get_ydata().min() for line in axes.lines)
    top = min(axes.get_ylim()[1], TALLEST * low)
    return low - 0.05 * (top - low), top
