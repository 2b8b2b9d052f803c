"""Comparison of runs that generate images: denoising loss per image, and Fréchet distance between generated and real
images by number of solver steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from looped.compare.classify_measure import OfImages
from looped.compare.curve import Metric
from looped.compare.measure import Common, MeanMeasured
from looped.compare.plan import Plan, RunSpec
from looped.compare.summary import MeanSummary
from looped.compare.table_cells import closing_notes, cost_cells, difference_cell, mean_cell, over_seeds
from looped.evaluation.image_features import pixel_features
from looped.evaluation.image_quality import evaluate_images
from looped.evaluation.plots import AXES
from looped.reports.sections import Table
from looped.tensor_types import Float

LOSS = Metric("loss", "loss", "", AXES["loss_at_sigma"], higher_is_better=False, worst=math.inf,
             examples="images", is_share=False)
DISTANCE = replace(LOSS, name="Fréchet distance", field="frechet_distance", axis=AXES["frechet_distance"])


@dataclass(frozen=True)
class MadeMeasured(MeanMeasured):
    """One run that generates images. `loss`: the denoising loss of each held-out image, at a noise level from the
    training distribution."""

    gauge: ClassVar[Metric] = LOSS
    depth_gauge: ClassVar[Metric] = DISTANCE
    loss: Float[Tensor, "num"]

    @property
    def followed(self) -> Float[Tensor, "num"]:
        return self.loss

    @property
    def by_depth(self) -> dict[int, float]:
        """Depth -> Fréchet distance, over pixels, between generated and held-out images."""
        return {row["depth"]: row["mean"] for row in self.rows if row["metric"] == DISTANCE.field}


class GeneratedImageMeasurer(OfImages):
    """Measures the losses and the generated images of each run."""

    keys: ClassVar[frozenset[str]] = frozenset({"loss"})

    def evaluate(self, place: RunSpec) -> dict[str, Any]:
        run, data = self.opened(place)
        found = evaluate_images(run.objective, data, run.config, self.depths(place), pixel_features())
        return {"rows": [row.as_dict() for row in found.rows], "loss": found.per_example["heldout_loss"][1].tolist()}

    def made(self, found: Mapping[str, Any], common: Common) -> MadeMeasured:
        return MadeMeasured(*common, loss=torch.tensor(found["loss"], dtype=torch.float64))


def made_table(arms: Sequence[MeanSummary], plan: Plan) -> Table:
    """The loss, the distance by depth, then the costs."""
    header = ["arm", "loss", f"against {arms[0].name}", *(f"distance, depth {depth}" for depth in plan.depths),
              "seconds", "steps", "layer forwards", "peak MB"]
    return Table(header, [_line(arm, plan) for arm in arms])


def _line(arm: MeanSummary, plan: Plan) -> list[str]:
    costs = cost_cells(arm)
    return [arm.name, mean_cell(arm.main), difference_cell(arm.difference),
            *(mean_cell(arm.by_depth.get(depth)) for depth in plan.depths),
            *(costs[name] for name in ("seconds", "steps", "layer forwards", "peak MB"))]


def made_notes(arms: Sequence[MeanSummary], plan: Plan) -> list[str]:
    """Notes that explain the columns."""
    num = len(arms[0].runs[0].loss)
    return [
        f"loss: the denoising loss of {num} held-out images ({plan.config.images.source}) at noise levels from the "
        f"training distribution, the same levels for every arm (lower is better), {over_seeds(plan)}. Losses of arms "
        f"that weight the levels differently (denoise.weight) are not comparable.",
        f"against {arms[0].name}: the difference in loss, paired by image and seed; the 95 % interval is a bootstrap "
        f"over images of the mean over seeds, so it does not include the spread between seeds.",
        "distance, depth n: the Fréchet distance in pixel space between the held-out images and as many images "
        "generated with n solver steps (lower is better); it compares whole sets and so has no interval.",
        *closing_notes(arms, plan)]
