"""Images to make: the denoising loss by noise level, and the distance of made images from real ones by depth."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from looped.config import Config
from looped.data.labelled import LabelledData, SoughtImages
from looped.domains.base import About, Domain, Options, Own, Request
from looped.errors import UserError
from looped.evaluation.image_features import pixel_features
from looped.evaluation.image_quality import evaluate_images, heldout_errors, training_levels, training_row
from looped.evaluation.image_samples import grid_of_classes, write_picture
from looped.evaluation.report import depth_table, draw_evaluation, level_table
from looped.evaluation.rows import Keep, Row
from looped.evaluation.store import EvaluationFiles
from looped.inference.rollout import rollout_of
from looped.objectives.base import Objective


@dataclass(frozen=True)
class GenerateEvaluated:
    """The losses and distances of a run that makes images."""

    rows: list[Row]

    def table(self, name: str) -> str:
        rows = [row.as_dict() for row in self.rows]
        return f"{level_table(rows)}\n\n{depth_table({name: rows})}"

    def leave(self, files: EvaluationFiles, config: Config, about: About) -> str:
        draw_evaluation(files, config, about.name)
        return f"pictures in {files.folder / 'plots'}, rows in {files.folder / 'eval'}"


class Generate(Domain):
    """Images of a class, made out of noise."""

    name, unit = "generate", ""
    flags = frozenset({"features"})
    asks = frozenset({"guidance", "out"})
    makes = "makes images"

    def does(self, config: Config) -> str:
        return "makes images"

    def batches(self, data: LabelledData, config: Config) -> Iterable[SoughtImages]:
        return data.heldout(config.evaluation.batch_size)

    def validate(self, objective: Objective, data: LabelledData, config: Config, own: Own) -> dict[str, float]:
        """The denoising loss of held-out images at training levels, each read by the block that owns it, with the same
        noise at every call."""
        levels = training_levels(objective, data, config)
        return {"loss": heldout_errors(objective, data, config, levels).mean().item()}

    def preview(self, objective: Objective, data: LabelledData, config: Config) -> np.ndarray:
        """A row of `evaluation.num_samples` images for each class, at the deepest of `evaluation.sample_depths`."""
        c = config.evaluation
        return grid_of_classes(objective, data.images.scale, max(c.sample_depths), c.num_samples,
                               guidance=config.denoise.guidance, seed=config.seed, batch_size=c.batch_size)

    def evaluate(self, objective: Objective, data: LabelledData, config: Config, depths: Sequence[int],
                 options: Options, *, keep: Keep) -> GenerateEvaluated:
        features = options.features or pixel_features()
        rows = evaluate_images(objective, data, config, depths, features, keep=keep).rows
        if options.features is not None:
            rows = [*rows, training_row(data, features)]
            keep(rows[-1:])
        return GenerateEvaluated(rows)

    def generate(self, run: Any, request: Request) -> Iterator[str]:
        """A picture with a row for each class."""
        guidance = run.config.denoise.guidance if request.guidance is None else request.guidance
        if not 0 <= guidance < math.inf:
            raise UserError(f"--guidance {guidance} is negative or not a number; use 1 for the plain class")
        path = request.out or Path("grid.png")
        picture = grid_of_classes(run.objective, run.scale, request.depth, request.num_samples, guidance=guidance,
                                  seed=run.config.seed, batch_size=run.config.evaluation.batch_size)
        write_picture(picture, path)
        cost = rollout_of(run.objective).image_cost(request.depth, guidance)
        yield (f"{path}: a row each of {', '.join(run.class_names)}; {request.depth} solver steps, "
               f"{cost.layer_forwards:,.0f} layer forwards an image")
