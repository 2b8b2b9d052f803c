"""Plots of an evaluation: quality over depth with the trained depths shaded, loss over noise level."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]

AXES = {"nats_per_token": "held-out loss (nats/token)", "bits_per_byte": "held-out loss (bits/byte)",
        "accuracy": "held-out accuracy", "nats_at_sigma": "held-out loss (nats/token)",
        "loss_at_sigma": "held-out squared error, weighted", "frechet_distance": "Fréchet distance to held-out images",
        "precision": "fraction of generated images close to held-out ones",
        "recall": "fraction of held-out images close to generated ones", "solved": "share of problems solved",
        "cells": "fraction of predicted cells correct", "solved_with_exit": "share of problems solved, with early exit",
        "acc": "fraction of questions answered correctly", "acc_norm": "fraction of questions answered correctly",
        "exact_match": "fraction of exact matches", "word_perplexity": "perplexity per word",
        "steps_used": "mean steps until exit", "lost_by_exit": "lost by early exit (share solved, or nats/token)"}
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8f5fb0", "#c78100", "#4a4a4a", "#2aa5a0", "#7b4a2b", "#d678b4", "#8a9a00")


@dataclass(frozen=True)
class Curve:
    """Rows of one metric by depth, and the range of depths at which the `run` was trained."""

    label: str
    rows: Rows
    trained: tuple[int, int]
    metric: str
    run: str


def plot_depth(curves: Sequence[Curve], path: Path) -> None:
    """Quality over depth with 95 % intervals as bands. A shaded span per run, in the colour of its first curve, marks
    its trained depths.

    Raises ValueError for a file type that matplotlib does not write.
    """
    figure, axes = new_figure()
    shaded: set[str] = set()
    for curve, colour in zip(curves, colours(len(curves)), strict=True):
        depths = [row["depth"] for row in curve.rows]
        axes.plot(depths, [row["mean"] for row in curve.rows], "o-", color=colour, markersize=4, label=curve.label)
        low, high = ([row.get(end, row["mean"]) for row in curve.rows] for end in ("ci_low", "ci_high"))
        axes.fill_between(depths, low, high, color=colour, alpha=0.12, linewidth=0)
        if curve.run in shaded:
            continue
        shaded.add(curve.run)
        low, high = curve.trained
        axes.axvspan(low / 1.06, high * 1.06, color=colour, alpha=0.08, linewidth=0,
                     label=f"trained depth, {curve.run}: {low if low == high else f'{low} to {high}'}")
    over_depth(axes, {row["depth"] for curve in curves for row in curve.rows})
    axes.set_ylabel(AXES.get(curves[0].metric, curves[0].metric))
    save(figure, axes, path)


def plot_sigma(runs: Mapping[str, Rows], path: Path) -> None:
    """Loss over noise level: cross-entropy, or a squared error."""
    figure, axes = new_figure()
    for (label, rows), colour in zip(runs.items(), colours(len(runs)), strict=True):
        rows = sorted(rows, key=lambda row: row["sigma"])
        axes.plot([row["sigma"] for row in rows], [row["mean"] for row in rows], "o-", color=colour, markersize=4,
                  label=label)
        low, high = ([row.get(end, row["mean"]) for row in rows] for end in ("ci_low", "ci_high"))
        axes.fill_between([row["sigma"] for row in rows], low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlabel("noise level sigma")
    axes.set_ylabel(AXES.get(rows[0]["metric"], rows[0]["metric"]))
    save(figure, axes, path)


def new_figure(width: float = 7.0, height: float = 4.2) -> tuple[Any, Any]:
    """A figure of a size in inches, without pyplot, which would look for a display and keep global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def over_depth(axes: Any, depths: Iterable[int]) -> None:
    """Give the axes a log2 axis of depths, with a tick at each."""
    ticks = sorted(depths)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("depth (loop steps, or solver steps of a denoiser)")


def colours(count: int) -> list[str]:
    """One colour per curve, for `count` curves."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def markers(count: int) -> list[str]:
    """One marker per point, for `count` points: another one where the colours repeat."""
    return ["osD^v"[i // len(COLOURS) % 5] for i in range(count)]


def save(figure: Any, axes: Any, path: Path) -> None:
    """Save a plot of curves, with a grid and a legend."""
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
