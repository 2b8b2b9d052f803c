"""Quality of a pixel denoiser, as rows: loss by noise level and block, distances of its images to held-out ones."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from looped.config import Config
from looped.data.image_batches import LabelledData, SoughtImages
from looped.diffusion.noise import LogUniform
from looped.evaluation.depth_sweep import Evaluation, peak_bytes
from looped.evaluation.image_distances import distances, frechet_distance
from looped.evaluation.image_features import Features
from looped.evaluation.image_samples import make_images
from looped.evaluation.metric_rows import Keep, Row, example_lines, keep_nothing, summarise
from looped.evaluation.workers import ALONE, Workers, placed
from looped.inference.rollout import rollout_of
from looped.objectives.base import evaluating
from looped.objectives.pixel_denoising import DenoisePixels
from looped.rng import StepRandom
from looped.tensor_types import Float, Float64

NUM_LEVELS = 9
"""Noise levels of `loss_at_sigma`, evenly spaced in ln sigma from sigma_max to sigma_min."""
LOSS_STEP = -1
"""Step number of the noise draws, which no training step has."""


def evaluate_images(objective: DenoisePixels, data: LabelledData, config: Config, depths: Sequence[int],
                    features: Features, *, keep: Keep = keep_nothing) -> Evaluation:
    """Everything `looped eval` reports on a run that generates images. `keep` receives each finished part."""
    rows, per_example = loss_rows(objective, data, config)
    keep(rows, example_lines("heldout_loss", per_example["heldout_loss"]))
    return Evaluation(rows + distance_rows(objective, data, config, depths, features, keep=keep), per_example, [])


# ---- the loss --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def heldout_errors(objective: DenoisePixels, data: LabelledData, config: Config,
                   sigma: Float64[Tensor, "num"], workers: Workers = ALONE) -> Float[Tensor, "num"]:
    """The weighted squared error of each held-out image at its noise level, under the block that owns the level.
    workers: the processes that divide the batches."""
    device = next(objective.parameters()).device
    size = workers.batch_size(config.evaluation.batch_size, len(sigma))

    def of_batch(each: tuple[int, SoughtImages]) -> Float[Tensor, "batch"]:
        first, batch = each
        random = StepRandom(config.seed, LOSS_STEP, start=first, count=len(batch), device=device)
        return objective.losses(batch.to(device), sigma[first : first + len(batch)], random).cpu()

    with evaluating(objective):
        return torch.cat(workers.over(placed(data.heldout(size)), of_batch))


def training_levels(objective: DenoisePixels, data: LabelledData, config: Config) -> Float64[Tensor, "num"]:
    """One noise level of the training distribution per held-out image, the same in every call."""
    num = len(data.images.heldout)
    return objective.noise.sample(StepRandom(config.seed, LOSS_STEP, count=num).stratified("sigma"))


def loss_rows(objective: DenoisePixels, data: LabelledData,
              config: Config) -> tuple[list[Row], dict[str, dict[int, Tensor]]]:
    """`heldout_loss` over the training levels, of all blocks and of each one; `loss_at_sigma` by level. `by` names the
    block that owns the level, if there are several."""
    sigma = training_levels(objective, data, config)
    errors, owners = heldout_errors(objective, data, config, sigma), objective.denoiser.owners(sigma)
    rows = [summarise("heldout_loss", errors)]
    if objective.denoiser.edges is not None:
        rows += [summarise("heldout_loss", errors[owners == block], by=_name(block))
                 for block in owners.unique().tolist()]
    noise = objective.noise
    for level in LogUniform(noise.sigma_min, noise.sigma_max).quantile(
            torch.linspace(1, 0, NUM_LEVELS, dtype=torch.float64)):
        by = {} if objective.denoiser.edges is None else {"by": _name(int(objective.denoiser.owners(level)))}
        at = heldout_errors(objective, data, config, level.expand(len(sigma)))
        rows.append(summarise("loss_at_sigma", at, sigma=level.item(), **by))
    return rows, {"heldout_loss": {1: errors}}


def _name(block: int) -> str:
    return f"block {block}"


# ---- the images ------------------------------------------------------------------------------------------------------


def distance_rows(objective: DenoisePixels, data: LabelledData, config: Config, depths: Sequence[int],
                  features: Features, *, keep: Keep = keep_nothing) -> list[Row]:
    """Fréchet distance, precision and recall of generated against held-out images, at each number of solver steps.

    As many images as are held out (or `evaluation.num_images`) are generated, of the same classes. layer_forwards,
    evaluations: per image.
    """
    c, scale, heldout = config.evaluation, data.images.scale, data.images.heldout
    guidance = config.denoise.guidance
    labels = torch.from_numpy(heldout.pictures.labels)
    labels = labels[torch.arange(c.num_images or len(labels)) % len(labels)]
    real, rows = features.of(torch.from_numpy(heldout.pictures.pixels)), []
    for depth in depths:
        start = time.perf_counter()
        images = make_images(objective, labels, depth, guidance=guidance, seed=config.seed, batch_size=c.batch_size)
        cost = {"depth": depth, "seconds": time.perf_counter() - start, "peak_bytes": peak_bytes(),
                **rollout_of(objective).image_cost(depth, guidance).fields()}
        found = distances(real, features.of(scale.levels(images)), by=features.name)
        part = [Row(metric, value, None, None, len(labels), by=found.by, **cost) for metric, value in
                (("frechet_distance", found.frechet), ("precision", found.precision), ("recall", found.recall))]
        keep(part)
        rows += part
    return rows


def training_row(data: LabelledData, features: Features) -> Row:
    """`frechet_distance_of_training`: distance of training images to the held-out ones, which a perfect generator has.

    As many training images of each class are used as are held out. With random classes they would be further off than
    generated images, which have the held-out classes.
    """
    trained, heldout = data.images.train.pictures, data.images.heldout.pictures
    rows = [np.flatnonzero(trained.labels == label)[:count]
            for label, count in zip(*np.unique(heldout.labels, return_counts=True), strict=True)]
    real, others = (features.of(torch.from_numpy(pixels)) for pixels in
                    (heldout.pixels, trained.pixels[np.concatenate(rows)]))
    return Row("frechet_distance_of_training", frechet_distance(real, others), None, None, len(others),
               by=features.name)
