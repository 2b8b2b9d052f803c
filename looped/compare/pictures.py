"""The pictures of a comparison: quality over depth, and next-token loss over what has been spent."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from looped.compare.summary import BUDGETS, ArmSummary
from looped.compare.table import UNITS
from looped.evaluation.plots import AXES, COLOURS

DEPTH = "plots/depth.png"
GRID = 200
TALLEST = 2.0
"""A picture ends at this multiple of its lowest loss, so that one arm that fails does not flatten the others."""


def budget_picture(unit: str) -> str:
    """The file of the curves over one of `BUDGETS`."""
    return f"plots/{unit.replace('_', '-')}.png"


def draw(arms: Sequence[ArmSummary], out: Path) -> None:
    """All pictures; every arm has one colour in them."""
    (out / "plots").mkdir(exist_ok=True)
    plot_depths(arms, out / DEPTH)
    for unit in BUDGETS:
        plot_budget(arms, unit, out / budget_picture(unit))


def plot_depths(arms: Sequence[ArmSummary], path: Path) -> None:
    """Nats a token over depth: the mean over seeds, from the lowest to the highest seed shaded."""
    figure, axes = _figure(7.0)
    for arm, colour in zip(arms, _colours(arms), strict=True):
        depths = list(arm.by_depth)
        seeds = np.array([[run.losses["nats_per_token"][depth].mean().item() for depth in depths] for run in arm.runs])
        _band(axes, depths, seeds, colour, arm.name, "o-")
    ticks = sorted({depth for arm in arms for depth in arm.by_depth})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("depth (loop steps, or solver steps of a denoiser)")
    _save(figure, axes, path)


def plot_budget(arms: Sequence[ArmSummary], unit: str, path: Path) -> None:
    """Next-token loss over what has been spent of one budget."""
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
    _save(figure, axes, path)


def curves(arm: ArmSummary, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """(grid, next-token loss of each seed on it): straight lines between evaluations, over the range all seeds have."""
    lines = [[(line[unit], line["next_token"]) for line in run.curve] for run in arm.runs]
    low, high = max(line[0][0] for line in lines), min(line[-1][0] for line in lines)
    grid = np.geomspace(low, high, GRID) if low < high else np.array([high])
    return grid, np.array([np.interp(grid, *zip(*line, strict=True)) for line in lines])


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


def _save(figure, axes, path: Path) -> None:
    low = min(line.get_ydata().min() for line in axes.lines)
    top = min(axes.get_ylim()[1], TALLEST * low)
    axes.set_ylim(low - 0.05 * (top - low), top)
    axes.set_ylabel(AXES["nats_per_token"])
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
