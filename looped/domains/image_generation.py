"""The domain of image generation: denoising loss by noise level, and Fréchet distance of samples by depth."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from looped.config import Config
from looped.data.image_batches import LabelledData, SoughtImages
from looped.domains.base import Domain, Evaluated, Options, Own, Request
from looped.errors import UserError
from looped.evaluation.image_features import pixel_features
from looped.evaluation.image_quality import evaluate_images, heldout_errors, training_levels, training_row
from looped.evaluation.image_samples import grid_of_classes, write_picture
from looped.evaluation.metric_rows import Keep
from looped.evaluation.workers import Workers
from looped.inference.rollout import rollout_of
from looped.objectives.base import Objective
from looped.reports.runs import level_table
from looped.reports.sections import Section


class GenerateEvaluated(Evaluated):
    """The losses and distances of a run that makes images."""

    def sections(self, name: str) -> list[Section]:
        return [level_table([row.as_dict() for row in self.rows]), *super().sections(name)]


class Generate(Domain):
    """Images of a class, generated from noise."""

    name = "generate"
    unit = ""
    flags: ClassVar[frozenset[str]] = frozenset({"features"})
    asks: ClassVar[frozenset[str]] = frozenset({"guidance", "out"})
    makes = "makes images"
    end_to_end = "denoise"

    def does(self, config: Config) -> str:
        return "makes images"

    def solver_step(self, objective: Objective, parts: Sequence[SoughtImages]) -> Callable[[], Tensor]:
        images, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels"))
        sigma = torch.full((len(images),), objective.noise.sigma_max, dtype=torch.float64)
        return lambda: objective.denoiser(images, sigma, labels)

    def batches(self, data: LabelledData, config: Config) -> Iterable[SoughtImages]:
        return data.heldout(config.evaluation.batch_size)

    def validate(self, objective: Objective, data: LabelledData, config: Config, own: Own,
                 workers: Workers) -> dict[str, float]:
        """The denoising loss of held-out images at training noise levels, each evaluated by the block of that level,
        with the same noise at every call."""
        levels = training_levels(objective, data, config)
        return {"loss": heldout_errors(objective, data, config, levels, workers).mean().item()}

    def preview(self, objective: Objective, data: LabelledData, config: Config, workers: Workers) -> np.ndarray:
        """One row of `evaluation.num_samples` images per class, at the deepest of `evaluation.sample_depths`."""
        c = config.evaluation
        return grid_of_classes(objective, data.images.scale, max(c.sample_depths), c.num_samples,
                               config.denoise.guidance, config, workers)

    def sequences(self, data: LabelledData, config: Config, options: Options) -> list[dict[str, Any]]:
        labels = torch.cat([batch.labels for batch in self.batches(data, config)]).tolist()
        return [{"index": list(range(len(labels))), "label": labels}]

    def evaluate(self, objective: Objective, data: LabelledData, config: Config, depths: Sequence[int],
                 options: Options, *, keep: Keep) -> GenerateEvaluated:
        features = options.features or pixel_features()
        rows = evaluate_images(objective, data, config, depths, features, keep=keep).rows
        if options.features is not None:
            rows = [*rows, training_row(data, features)]
            keep(rows[-1:])
        return GenerateEvaluated(rows)

    def generate(self, run: Any, request: Request) -> Iterator[str]:
        """A picture with one row per class."""
        guidance = run.config.denoise.guidance if request.guidance is None else request.guidance
        if not 0 <= guidance < math.inf:
            raise UserError(f"--guidance {guidance} is negative or not a number; use 1 for the plain class")
        path = request.out or Path("grid.png")
        picture = grid_of_classes(run.objective, run.scale, request.depth, request.num_samples, guidance, run.config)
        write_picture(picture, path)
        cost = rollout_of(run.objective).image_cost(request.depth, guidance)
        yield (f"{path}: one row each of {', '.join(run.class_names)}; {request.depth} solver steps, "
               f"{cost.layer_forwards:,.0f} layer forwards per image")
