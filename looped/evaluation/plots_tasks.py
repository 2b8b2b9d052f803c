"""Plots of a task: share solved over depth and difficulty, convergence of the latent, one problem cell by cell.

The trained range is outlined in the map and shaded behind the curves.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from looped.data.task import Cells, Problem, Task
from looped.evaluation.metric_rows import Row
from looped.evaluation.plots import AXES, COLOURS, new_figure, over_depth, save
from looped.evaluation.stability import Stability

RIGHT: Mapping[int, int] = {}
TRAINED = "#c25a00"
GIVEN, SOUGHT, WRONG = "#1d2329", COLOURS[0], "#c1121f"
LEGIBLE = 140
"""Largest number of fields of a map that still show their figures."""
WRAP = 32
"""Cells per line; a longer row is wrapped."""
LONGEST = 512
"""Largest number of cells drawn; the rest of a longer problem is left out."""


@dataclass(frozen=True)
class Trained:
    """Lowest and highest depth and difficulty of training."""

    depths: tuple[int, int]
    difficulties: tuple[int, int]


# ---- depth and difficulty --------------------------------------------------------------------------------------------


def plot_map(shares: Mapping[int, Mapping[int, float]], trained: Trained, path: Path, *, difficulty: str) -> None:
    """Heat map of the share solved, `shares[difficulty][depth]`, with a frame around the trained range."""
    levels, depths = sorted(shares), sorted(set().union(*shares.values()))
    figure, axes = new_figure(2.2 + 0.62 * len(depths), 1.5 + 0.46 * len(levels))
    values = np.array([[shares[level].get(depth, np.nan) for depth in depths] for level in levels])
    image = draw_map(axes, values, depths, levels)
    _frame(axes, _within(trained.depths, depths), _within(trained.difficulties, levels))
    axes.set_xlabel("depth (steps)")
    axes.set_ylabel(difficulty)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.02, label=AXES["solved"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside upper right")
    figure.savefig(path)


def draw_map(axes: Any, shares: np.ndarray, depths: Sequence[int], levels: Sequence[int]) -> Any:
    """Draw shares (levels, depths) as a heat map, the first level at the bottom, with figures if there is room."""
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
    axes.set_xticks(range(len(depths)), list(map(str, depths)), fontsize=8)
    axes.set_yticks(range(len(levels)), list(map(str, levels)), fontsize=8)
    if shares.size <= LEGIBLE:
        for row, column in np.argwhere(~np.isnan(shares)):
            share = shares[row, column]
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=7,
                      color="white" if share > 0.6 else GIVEN)
    return image


def _within(trained: tuple[int, int], measured: Sequence[int]) -> tuple[float, float]:
    """Start and end of a range among the columns (or rows) of a map: around the fields it contains; if there are none,
    one field wide, between the nearest."""
    held = [place for place, value in enumerate(measured) if trained[0] <= value <= trained[1]]
    if held:
        return held[0] - 0.5, held[-1] + 0.5
    middle = np.log2(np.maximum(trained, 1)).mean()
    place = float(np.interp(middle, np.log2(np.maximum(measured, 1)), np.arange(len(measured))))
    return place - 0.5, place + 0.5


def _frame(axes, columns: tuple[float, float], rows: tuple[float, float]) -> None:
    from matplotlib.patches import Rectangle

    inset = 0.03
    axes.add_patch(Rectangle(
        (columns[0] + inset, rows[0] + inset), columns[1] - columns[0] - 2 * inset, rows[1] - rows[0] - 2 * inset,
        fill=False, edgecolor=TRAINED, linewidth=2, label="trained", clip_on=False, zorder=3))


def plot_levels(rows: Sequence[Row], trained: Trained, path: Path, *, difficulty: str) -> None:
    """Share solved over depth, one curve with a 95 % band per difficulty: solid if trained, dashed if not. The trained
    depths are shaded."""
    from matplotlib import colormaps

    levels = sorted({row.difficulty for row in rows})
    figure, axes = new_figure()
    low, high = trained.depths
    axes.axvspan(low / 1.06, high * 1.06, color=TRAINED, alpha=0.1, linewidth=0,
                 label=f"trained depth: {low if low == high else f'{low} to {high}'}")
    for place, level in enumerate(levels):
        curve = sorted((row for row in rows if row.difficulty == level), key=lambda row: row.depth)
        seen = trained.difficulties[0] <= level <= trained.difficulties[1]
        colour = colormaps["viridis"](0.88 * place / max(len(levels) - 1, 1))
        depths = [row.depth for row in curve]
        axes.plot(depths, [row.mean for row in curve], "o-" if seen else "o--", color=colour, markersize=4,
                  label=f"{difficulty}: {level}" + (" (trained)" if seen else ""))
        axes.fill_between(depths, *zip(*(row.ends for row in curve), strict=True), color=colour,
                          alpha=0.13, linewidth=0)
    over_depth(axes, {row.depth for row in rows})
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel(AXES["solved"])
    save(figure, axes, path)


# ---- convergence -----------------------------------------------------------------------------------------------------


def plot_rest(solves: Sequence[Stability], path: Path, *, difficulty: str) -> None:
    """Relative change of the latent at each step: medians with their 95 % bands."""
    from matplotlib import colormaps

    figure, axes = new_figure()
    for place, solve in enumerate(solves):
        steps = solve.by_step("latent_change")
        colour = colormaps["viridis"](0.88 * place / max(len(solves) - 1, 1))
        axes.plot(list(steps), [max(row.mean, 1e-8) for row in steps.values()], "-", color=colour,
                  label=f"{difficulty}: {solve.difficulty}")
        axes.fill_between(list(steps), *([max(row.ends[end], 1e-8) for row in steps.values()]
                                         for end in (0, 1)), color=colour, alpha=0.13, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(f"relative change of the {solves[0].latent}")
    save(figure, axes, path)


# ---- one problem -----------------------------------------------------------------------------------------------------


def plot_problem(task: Task, problem: Problem, answer: Cells, path: Path) -> None:
    """A problem next to its answer (above it, if wide): predicted cells in another colour, wrong cells marked and, if
    there is room, with the correct symbol. A correct answer that is not the reference has no wrong cells."""
    from matplotlib.figure import Figure

    cells = np.where(problem.scored, answer, problem.inputs)
    wrong = (cells != problem.targets) & problem.scored
    if task.solved_by(problem, answer):
        wrong = np.zeros_like(wrong)
    lines, columns = _shape(task, len(problem))
    scale = min(0.42, 6.0 / max(lines, columns))
    below = columns > 1.5 * lines
    size = np.array([columns * scale + 0.3, lines * scale + 0.5]) * ((1, 2) if below else (2, 1))
    figure = Figure(figsize=tuple(np.maximum(size, (3.8, 1.6))), dpi=150, layout="constrained")
    before, after = figure.subplots(*((2, 1) if below else (1, 2)))
    ink = np.where(problem.scored, SOUGHT, GIVEN)
    draw_cells(before, task, problem.inputs, np.full(len(problem), GIVEN), scale)
    draw_cells(after, task, cells, ink, scale,
               {cell: int(problem.targets[cell]) for cell in np.flatnonzero(wrong).tolist()})
    before.set_title("given", fontsize=9)
    said = "all correct" if not wrong.any() else f"{wrong.sum()} of {problem.scored.sum()} cells wrong"
    after.set_title(f"answer: {said}", fontsize=9, color=WRONG if wrong.any() else SOUGHT)
    figure.savefig(path)


def _shape(task: Task, length: int) -> tuple[int, int]:
    """(lines, columns) of the picture; a long row is wrapped."""
    rows, columns = task.shape(length)
    return (math.ceil(min(length, LONGEST) / WRAP), WRAP) if rows == 1 and columns > WRAP else (rows, columns)


def draw_cells(axes: Any, task: Task, cells: Cells, ink: np.ndarray, scale: float,
               wrong: Mapping[int, int] = RIGHT) -> None:
    """Draw a table of cells: symbols as their colour, if they have one, else as text. ink: colours of the text; scale:
    inches of a cell; wrong: cell -> correct symbol; these cells are framed and marked."""
    from matplotlib.patches import Rectangle

    lines, columns = _shape(task, len(cells))
    size = 72 * scale * 0.5 / max(1, 0.55 * max(map(len, task.symbols)))
    for cell in range(min(len(cells), lines * columns)):
        row, column = divmod(cell, columns)
        symbol = task.symbols[cells[cell]]
        face = task.colors.get(symbol, "white")
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=face, edgecolor="#c9ccd1", linewidth=0.5))
        if symbol not in task.colors and cells[cell] != 0:
            axes.text(column + 0.5, row + 0.54, symbol, ha="center", va="center", fontsize=size, color=ink[cell],
                      fontweight="bold" if ink[cell] == SOUGHT else "normal")
        if cell in wrong:
            _mark(axes, row, column, task.symbols[wrong[cell]] if symbol not in task.colors else "", size)
    _box_lines(axes, task.box, lines, columns)
    axes.set(xlim=(-0.06, columns + 0.06), ylim=(lines + 0.06, -0.06), aspect="equal")
    axes.axis("off")


def _mark(axes, row: int, column: int, right: str, size: float) -> None:
    """Frame a wrong cell, with the correct symbol small in its corner, or a cross if cells are colours."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column + 0.05, row + 0.05), 0.9, 0.9, facecolor=WRONG if right else "none", alpha=0.16,
                             linewidth=0, zorder=2))
    axes.add_patch(Rectangle((column + 0.05, row + 0.05), 0.9, 0.9, fill=False, edgecolor=WRONG, linewidth=1.3,
                             zorder=3))
    if right:
        axes.text(column + 0.88, row + 0.86, right, ha="right", va="bottom", fontsize=size * 0.5, color=WRONG, zorder=3)
    else:
        axes.plot([column + 0.25, column + 0.75], [row + 0.25, row + 0.75], color=WRONG, linewidth=1.3, zorder=3)
        axes.plot([column + 0.25, column + 0.75], [row + 0.75, row + 0.25], color=WRONG, linewidth=1.3, zorder=3)


def _box_lines(axes, box: tuple[int, int] | None, lines: int, columns: int) -> None:
    """Lines around the table and around its boxes."""
    high, wide = box or (lines, columns)
    style = {"color": GIVEN, "linewidth": 1.4, "solid_capstyle": "projecting"}
    for row in range(0, lines + 1, high):
        axes.plot([0, columns], [row, row], **style)
    for column in range(0, columns + 1, wide):
        axes.plot([column, column], [0, lines], **style)
