"""Plot of the share of puzzles solved over seconds of training, for finished comparisons: docs/puzzles.png, or --out.

    looped reproduce puzzles_per_hour --entries sudoku4,sudoku6,sudoku9 --arms denoise,denoise-loop,trm,truncated
    python scripts/draw_puzzles.py runs/puzzles-per-hour-cpu/sudoku{4,6,9}

One panel per folder; runs are those of its subfolders ARM-SEED. A line is the mean over seeds, a band their range.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from looped.evaluation.plots import COLOURS

Curve = np.ndarray
"""(evaluations, 2): seconds of training, share solved."""
ARMS = {"denoise": "denoise, one run of the core", "denoise-loop": "denoise, three runs",
        "trm": "TRM's rule and core", "truncated": "truncated", "full": "full"}
"""Arm -> its name in the legend; other arms are not drawn."""
TITLES = {"sudoku4": "4x4, 6 clues", "sudoku6": "6x6, 12 clues", "sudoku9": "9x9, 30 clues"}


def curves(folder: Path) -> dict[str, list[Curve]]:
    """Arm -> the curves of its seeds, from the runs of a comparison."""
    found = defaultdict(list)
    for path in sorted(folder.glob("*-*/metrics.jsonl")):
        arm = path.parent.name.rpartition("-")[0]
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        points = [(line["seconds"], line["solved"]) for line in lines if line["kind"] == "heldout"]
        if arm in ARMS and points:
            found[arm].append(np.array(points))
    return found


def draw_panel(axes: Axes, found: dict[str, list[Curve]]) -> None:
    """The curves of each arm, linear between evaluations, over the time that all its seeds cover."""
    for (arm, name), colour in zip(ARMS.items(), COLOURS, strict=False):
        if arm not in found:
            continue
        low, high = max(seed[0, 0] for seed in found[arm]), min(seed[-1, 0] for seed in found[arm])
        seconds = np.geomspace(low, high, 200) if low < high else np.array([high])
        shares = np.array([np.interp(seconds, *seed.T) for seed in found[arm]])
        axes.plot(seconds, shares.mean(0), color=colour, label=name)
        axes.fill_between(seconds, shares.min(0), shares.max(0), color=colour, alpha=0.18, linewidth=0)


def draw(folders: Sequence[Path], out: Path) -> None:
    """One panel per folder, with one legend above them."""
    figure = Figure(figsize=(3.4 * len(folders), 3.4), layout="constrained")
    panels = figure.subplots(1, len(folders), sharey=True, squeeze=False)[0]
    for axes, folder in zip(panels, folders, strict=True):
        draw_panel(axes, curves(folder))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_title(TITLES.get(folder.name, folder.name), fontsize=10)
        axes.set_xlabel("seconds of training, one core")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of held-out puzzles solved")
    lines = {line.get_label(): line for axes in panels for line in axes.lines}
    names = [name for name in ARMS.values() if name in lines]
    figure.legend([lines[name] for name in names], names, loc="outside upper center", ncols=len(names), frameon=False,
                  fontsize=8)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "puzzles.png")
    args = parser.parse_args()
    draw(args.folders, args.out)
