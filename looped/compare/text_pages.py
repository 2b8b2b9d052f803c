"""What a comparison on text shows besides its tables: losses over depth, and samples."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from looped.compare.pictures import band_note, picture, plot_depths
from looped.compare.plan import Plan
from looped.compare.text_summary import TextSummary
from looped.compare.text_table import samples_table
from looped.reports.sections import Figure, Folded, Heading, Section, Verbatim

NUM_SAMPLES = 3
"""Texts of an arm on the page."""


def text_figures(arms: Sequence[TextSummary], plan: Plan) -> list[Figure]:
    """Nats a token over depth."""
    path = picture(plan.out, "depth")
    plot_depths(arms, losses_by_depth, path)
    return [Figure(path, f"Held-out loss by depth, after training.{band_note(plan)}", "Held-out loss by depth")]


def losses_by_depth(arm: TextSummary) -> dict[int, list[float]]:
    """Depth -> the mean loss of each seed."""
    return {depth: [run.losses["nats_per_token"][depth].mean().item() for run in arm.runs] for depth in arm.by_depth}


def text_samples(arms: Sequence[TextSummary]) -> list[Section]:
    """Texts beside the twin's, and a few of each arm's first run, at the depth that stands for it."""
    return [Heading("Samples at equal diversity"), samples_table(arms),
            Heading("Samples"), *(_texts(arm, opened=not i) for i, arm in enumerate(arms))]


def _texts(arm: TextSummary, *, opened: bool) -> Section:
    run, depth = arm.runs[0], arm.runs[0].place.text_depth
    texts = [Verbatim(each["text"], each["prompt"]) for each in run.samples if each["depth"] == depth][:NUM_SAMPLES]
    return Folded(f"{arm.name}, seed {run.place.seed}, depth {depth}", texts, opened)


def text_rows(arm: TextSummary) -> list[dict[str, Any]]:
    """The difference to the first arm, as a row."""
    return [{"kind": "difference", **asdict(arm.difference)}] if arm.difference is not None else []
