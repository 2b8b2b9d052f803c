"""Plots and notes of a comparison on a task: the share solved over depth at two difficulties, a map over all
difficulties and depths for each arm, and notes that explain the columns."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from looped.compare.accuracy_summary import ShareSummary
from looped.compare.accuracy_table import share_notes
from looped.compare.plan import Plan
from looped.compare.plots import depth_figure, picture
from looped.compare.table_cells import over_seeds
from looped.data.task_data import prepare_task
from looped.evaluation.plots_tasks import draw_map
from looped.reports.sections import Beside, Figure, Section

ACROSS = 4
"""Maps per line."""


def task_figures(arms: Sequence[ShareSummary], plan: Plan) -> list[Section]:
    """Plots of the share solved over depth at the hardest trained difficulty and the next harder one, and the maps."""
    data = prepare_task(plan.config.task)
    hardest = data.train.high
    beyond = [difficulty for difficulty in arms[0].levels if difficulty > hardest][:1]
    found = [_over_depth(arms, plan, difficulty, f"{data.task.difficulty}: {difficulty}, {where}")
             for difficulty, where in zip([hardest, *beyond], ("the hardest trained", "beyond training"), strict=False)]
    path = picture(plan.out, "map")
    plot_maps(arms, data.task.difficulty, path)
    what, wide = "Share solved by depth and difficulty, after training", len(arms) > ACROSS / 2
    maps = Figure(path, f"{what}, mean over seeds.", what, wide)
    return [Beside(found), maps] if wide else [Beside([*found, maps])]


def _over_depth(arms: Sequence[ShareSummary], plan: Plan, difficulty: int, title: str) -> Figure:
    return depth_figure(arms, plan, f"Share solved by depth, {title}", name=f"depth-{difficulty}", title=title,
                        by_depth=lambda arm: arm.seeds_by_depth(difficulty))


def plot_maps(arms: Sequence[ShareSummary], difficulty: str, path: Path) -> None:
    """Plot one map per arm, `ACROSS` in a line: one field per depth and difficulty, labelled with the share solved."""
    from matplotlib.figure import Figure as Canvas

    across, down = min(len(arms), ACROSS), math.ceil(len(arms) / ACROSS)
    size = 1.2 + 2.8 * across, 0.5 + down * (0.7 + 0.5 * len(arms[0].levels))
    figure = Canvas(figsize=size, dpi=150, layout="constrained")
    fields = figure.subplots(down, across, squeeze=False).flatten()
    for arm, axes in zip(arms, fields, strict=False):
        _map(axes, arm)
    for axes in fields[len(arms):]:
        axes.remove()
    figure.supxlabel("depth", fontsize=9)
    figure.supylabel(difficulty, fontsize=9)
    figure.savefig(path)


def _map(axes, arm: ShareSummary) -> None:
    shares = np.array([[share.mean for share in level.shares.values()] for level in arm.levels.values()])
    depths = list(next(iter(arm.levels.values())).shares)
    draw_map(axes, shares, depths, list(arm.levels))
    axes.set_title(textwrap.fill(arm.name, 40), fontsize=9)


def task_notes(arms: Sequence[ShareSummary], plan: Plan) -> list[str]:
    """Notes that explain the columns."""
    data = prepare_task(plan.config.task)
    low, high = data.train.low, data.train.high
    return [
        f"Share solved: the fraction of held-out {data.task.name} problems that are solved (higher is better), "
        f"{over_seeds(plan)}. The number before a colon is the difficulty ({data.task.difficulty}; trained from {low} "
        f"to {high}), the one in brackets the depth: loop steps, or solver steps of a denoiser.",
        *share_notes(arms, plan, one="problem", group="problems of each difficulty",
                     followed=f"problems of difficulty {high}"),
    ]
