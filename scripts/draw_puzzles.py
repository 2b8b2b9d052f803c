"""Plot of the share of puzzles solved over seconds of training, by rule: docs/puzzles.png, from docs/puzzles.csv.

    python scripts/draw_puzzles.py
    looped reproduce puzzles_per_hour --entries sudoku6 --arms denoise,trm
    python scripts/draw_puzzles.py runs/puzzles-per-hour-cpu/sudoku6       with new figures

The folders are those of entries, with runs in subfolders ARM-SEED. Their evaluations during training replace the rows
of the same entry, arm and seed. One panel per entry; a line is the mean over seeds, a band their range.
"""

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from looped.evaluation.plots import COLOURS

Curve = list[tuple[float, float]]
"""(seconds of training, share solved) of each evaluation."""
Runs = dict[tuple[str, str, int], Curve]
"""(entry, arm, seed) -> its curve."""
ARMS = {"denoise": "denoise, one run of the core", "denoise-loop": "denoise, three runs",
        "trm": "TRM's rule and core", "truncated": "truncated", "full": "full"}
"""Arm -> its name in the legend; other arms are not drawn."""
TITLES = {"sudoku4": "4x4, 6 clues", "sudoku6": "6x6, 12 clues", "sudoku9": "9x9, 30 clues", "maze9": "mazes of 9x9"}
DOCS = Path(__file__).parents[1] / "docs"
COLUMNS = ("entry", "arm", "seed", "seconds", "solved")


def measured(folder: Path) -> Runs:
    """The curves of a comparison, from the evaluations during training of its runs."""
    found = {}
    for path in sorted(folder.glob("*-*/metrics.jsonl")):
        arm, _, seed = path.parent.name.rpartition("-")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[folder.name, arm, int(seed)] = [(round(line["seconds"], 1), round(line["solved"], 4))
                                              for line in lines if line["kind"] == "heldout"]
    return found


def read(path: Path) -> Runs:
    found = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found[row["entry"], row["arm"], int(row["seed"])].append((float(row["seconds"]), float(row["solved"])))
    return dict(found)


def write(path: Path, runs: Runs) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        rows.writerows((*run, f"{seconds:g}", f"{solved:g}") for run, curve in sorted(runs.items())
                       for seconds, solved in curve)


def draw_panel(axes: Axes, entry: str, runs: Runs) -> None:
    """The curves of each arm, linear between evaluations, over the time that all its seeds cover."""
    for (arm, name), colour in zip(ARMS.items(), COLOURS, strict=False):
        seeds = [np.array(curve) for run, curve in runs.items() if run[:2] == (entry, arm)]
        if not seeds:
            continue
        low, high = max(seed[0, 0] for seed in seeds), min(seed[-1, 0] for seed in seeds)
        seconds = np.geomspace(low, high, 200) if low < high else np.array([high])
        shares = np.array([np.interp(seconds, *seed.T) for seed in seeds])
        axes.plot(seconds, shares.mean(0), color=colour, label=name)
        axes.fill_between(seconds, shares.min(0), shares.max(0), color=colour, alpha=0.18, linewidth=0)


def draw(runs: Runs, out: Path) -> None:
    """One panel per entry, with one legend above them."""
    entries = [entry for entry in TITLES if any(run[0] == entry for run in runs)]
    figure = Figure(figsize=(3.4 * len(entries), 3.4), layout="constrained")
    panels = figure.subplots(1, len(entries), sharey=True, squeeze=False)[0]
    for axes, entry in zip(panels, entries, strict=True):
        draw_panel(axes, entry, runs)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_title(TITLES[entry], fontsize=10)
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
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--figures", type=Path, default=DOCS / "puzzles.csv")
    parser.add_argument("--out", type=Path, default=DOCS / "puzzles.png")
    args = parser.parse_args()
    runs = read(args.figures) if args.figures.exists() else {}
    for folder in args.folders:
        runs |= measured(folder)
    write(args.figures, runs)
    draw(runs, args.out)
