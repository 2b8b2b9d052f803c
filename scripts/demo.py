"""The demo: what depth buys, as a picture of two panels, a table and two sentences (`make demo`).

Five small models are trained, two at a time on one thread each. Prefix sums of up to 16 bits, in a single pass and by
back-propagation through the loop for equal processor time, read at 64 bits; and text by one layer of weights that is
applied three to five times, next to one and four layers that are applied once, on equal tokens.

    python scripts/demo.py [--out runs/demo] [--seed 1] [--training.budget 20 ...]

The same command continues where it was interrupted. Settings after the folder are those of every model.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from looped import read_results
from looped.evaluation.plots import COLOURS, over_depth

BITS = 64
"""Length of the prefix sums that are read; training ends at 16."""
UNROLLED_DEPTH, TRAINED = 8, 4
"""Depths at which `full` is trained on prefix sums, and, on average, the looped layer on text."""


@dataclass(frozen=True)
class Arm:
    """One model: its run's name, its label, the config and settings it is trained with, and how it is evaluated."""

    name: str
    label: str
    train: tuple[str, ...]
    evaluate: tuple[str, ...]


SUMS = ("--depths", "1,2,4,8,16,32,64", "--difficulties", str(BITS))
ONE_PASS = ("--objective", "ar")
SINGLE = Arm("sums-denoise", "trained in a single pass (denoise)", ("sums-denoise",), SUMS)
THROUGH = ("--objective", "full", "--model.state_init", "zero", "--recurrence.loss_on", "every")
UNROLLED = Arm("sums-full", f"trained through {UNROLLED_DEPTH} steps (full)", ("sums-denoise", *THROUGH), SUMS)
LOOP = Arm("text-loop", "one layer of weights, a loop", ("stdlib-one-layer",), ("--depths", "1,2,3,4,6,8,16"))
ONE = Arm("text-one", "one layer, one pass", ("stdlib-one-layer", *ONE_PASS), ("--depths", "1"))
FOUR = Arm("text-four", "four layers, one pass", ("stdlib-one-layer", *ONE_PASS, "--model.num_core_layers", "4"),
           ("--depths", "1"))
ARMS = (LOOP, FOUR, SINGLE, UNROLLED, ONE)
"""The longest first, so that both cores end at about the same time."""


def make(arm: Arm, folder: Path, settings: list[str]) -> None:
    """Train and evaluate a model."""
    run = str(folder / arm.name)
    say(arm, ["train", *arm.train, "--run", run, *settings])
    say(arm, ["eval", run, *arm.evaluate])


def say(arm: Arm, command: list[str]) -> None:
    """Run a `looped` command in a process of one thread, its lines printed behind the name of the model. Raises
    SystemExit where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, "-m", "looped.cli", *command], env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            print(f"{arm.name}: {line}", end="", flush=True)
    if process.returncode:
        raise SystemExit(f"{arm.name} ended with exit code {process.returncode}; the same command continues")


def curve(folder: Path, arm: Arm, metric: str) -> pd.DataFrame:
    """The rows of a metric, from the least depth to the most."""
    rows = read_results([folder / arm.name])
    return rows[rows.metric == metric].sort_values("depth")


def draw(sums: dict[str, pd.DataFrame], text: dict[str, pd.DataFrame], path: Path) -> None:
    """Both panels: share solved over depth, and loss over depth with the models of one pass as lines."""
    figure = Figure(figsize=(10, 3.9), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for (label, rows), colour in zip(sums.items(), COLOURS, strict=False):
        band(left, rows, colour, label)
    left.set_title(f"Prefix sums of {BITS} bits, trained on at most 16", fontsize=10)
    left.set_ylabel("share of problems solved")
    left.axvline(UNROLLED_DEPTH, color="#888888", linewidth=0.8, linestyle=":", label="depth that full was trained at")
    loop, *baselines = text.items()
    band(right, loop[1], COLOURS[2], loop[0])
    for (label, rows), style in zip(baselines, ("--", "-."), strict=True):
        right.axhline(rows["mean"].iloc[0], color="#4a4a4a", linewidth=1.2, linestyle=style, label=label)
    right.axvline(TRAINED, color="#888888", linewidth=0.8, linestyle=":", label="mean trained depth")
    right.set_title("Text, equal tokens", fontsize=10)
    right.set_ylabel("held-out loss (nats/token)")
    for axes, rows in ((left, next(iter(sums.values()))), (right, loop[1])):
        over_depth(axes, rows["depth"].astype(int))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def band(axes: Any, rows: pd.DataFrame, colour: str, label: str) -> None:
    """A curve over depth with its 95 % interval."""
    depths = rows["depth"].astype(float)
    axes.plot(depths, rows["mean"], "o-", color=colour, markersize=4, label=label)
    axes.fill_between(depths, rows["ci_low"], rows["ci_high"], color=colour, alpha=0.12, linewidth=0)


def at(rows: pd.DataFrame, depth: int) -> float:
    """The mean at a depth, or at the deepest one that was measured below it."""
    return rows[rows.depth <= depth]["mean"].iloc[-1]


def table(sums: dict[str, pd.DataFrame], text: dict[str, pd.DataFrame]) -> list[str]:
    """Markdown: a row per model, a column per depth."""
    depths = sorted({int(depth) for rows in (*sums.values(), *text.values()) for depth in rows.depth})
    lines = [f"| model | {' | '.join(f'depth {depth}' for depth in depths)} |", "|---|" + "---:|" * len(depths)]
    for what, group, digits in ((f"{BITS} bits, share solved", sums, 2), ("text, nats/token", text, 3)):
        for label, rows in group.items():
            means = {int(depth): f"{mean:.{digits}f}" for depth, mean in zip(rows["depth"], rows["mean"], strict=True)}
            lines.append(f"| {what}: {label} | {' | '.join(means.get(depth, '') for depth in depths)} |")
    return lines


def sentences(sums: dict[str, pd.DataFrame], text: dict[str, pd.DataFrame]) -> list[str]:
    """A sentence on each panel, with its figures."""
    single, unrolled = sums.values()
    loop, one, four = text.values()
    deepest, best = int(loop.depth.max()), at(loop, TRAINED)
    beyond = at(loop, deepest)
    after = "loses again" if beyond > best + 0.01 else "keeps it"
    return [f"Prefix sums: trained in a single pass on at most 16 bits, the loop solves {at(single, 1):.2f} of the "
            f"{BITS}-bit problems in one step and {at(single, 64):.2f} in 64; trained through {UNROLLED_DEPTH} steps "
            f"for the same processor time, {at(unrolled, 1):.2f} and {at(unrolled, 64):.2f}.",
            f"Text: one layer of weights has {at(loop, 1):.2f} nats/token after one step of its loop and {best:.2f} "
            f"after {TRAINED}, its mean trained depth; one layer applied once has {at(one, 1):.2f}, four layers "
            f"of weights {at(four, 1):.2f}; beyond its trained depth the loop {after} ({beyond:.2f} at {deepest})."]


def main(arguments: list[str] | None = None) -> None:
    """Everything, as the command line asks for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"),
                        help="folder of the runs, the picture and the table")
    asked, settings = parser.parse_known_args(arguments)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(make, arm, asked.out, settings) for arm in ARMS]:
            done.result()
    sums = {arm.label: curve(asked.out, arm, "solved") for arm in (SINGLE, UNROLLED)}
    text = {arm.label: curve(asked.out, arm, "nats_per_token") for arm in (LOOP, ONE, FOUR)}
    draw(sums, text, asked.out / "depth.png")
    found = "\n\n".join(["\n".join(table(sums, text)), *sentences(sums, text)]) + "\n"
    (asked.out / "depth.md").write_text(found, encoding="utf-8", newline="")
    print(f"\n{found}\n{asked.out / 'depth.png'} shows it; it is also in {asked.out / 'depth.md'}")


if __name__ == "__main__":
    main()
