"""Class-conditional images of a pixel denoiser, with any number of solver steps, and grids of them.

Random draws depend on an image's index alone, so an image is the same in any batch, up to rounding.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from looped.config import Config
from looped.data.images import Normalizer
from looped.diffusion.solver_from_config import solve
from looped.errors import UserError
from looped.evaluation.workers import ALONE, Workers
from looped.objectives.base import evaluating
from looped.objectives.pixel_denoising import DenoisePixels
from looped.rng import StepRandom
from looped.tensor_types import Float, Int, UInt8

Images = Float[Tensor, "num channels down across"]
MIN_SIDE = 512
"""Minimum pixels of a grid's shorter side; small images are enlarged by whole factors."""


@torch.no_grad()
def make_images(objective: DenoisePixels, labels: Int[Tensor, "num"], num_steps: int, *, guidance: float = 1.0,
                seed: int = 0, batch_size: int = 64, workers: Workers = ALONE) -> Images:
    """Images of the classes `labels` after `num_steps` steps of the configured solver, on the CPU, scaled as in
    training. workers: the processes that divide the batches, and all call it. Raises UserError for guidance if the
    model was trained without label dropout."""
    if guidance != 1 and not objective.label_dropout:
        raise UserError(f"guidance {guidance:g} needs a model that was also trained without classes, and this one was "
                        f"trained with images.label_dropout 0; use 1")
    device, size = next(objective.parameters()).device, workers.batch_size(batch_size, len(labels))

    def made(first: int) -> Images:
        return _solved(objective, labels[first : first + size].to(device), num_steps, guidance, seed, first).cpu()

    with evaluating(objective):
        return torch.cat(workers.over(range(0, len(labels), size), made))


def _solved(objective: DenoisePixels, labels: Tensor, num_steps: int, guidance: float, seed: int,
            first: int) -> Images:
    picture = objective.model.picture
    random = StepRandom(seed, 0, start=first, count=len(labels), device=labels.device)
    return solve(objective.config, objective.noise, objective.denoiser.solver(labels, guidance), num_steps,
                 normal=lambda stream: random.normal(stream, (picture.channels, picture.height, picture.width)))


def grid_of_classes(objective: DenoisePixels, scale: Normalizer, num_steps: int, per_class: int, guidance: float,
                    config: Config, workers: Workers = ALONE) -> UInt8[np.ndarray, "height width channels"]:
    """A grid with one row of `per_class` images per class; seed and batch size come from the config. workers: as of
    `make_images`."""
    labels = torch.arange(objective.model.num_classes).repeat_interleave(per_class)
    images = make_images(objective, labels, num_steps, guidance=guidance, seed=config.seed,
                         batch_size=config.evaluation.batch_size, workers=workers)
    return tile(scale.levels(images).numpy(), per_class)


def tile(pixels: UInt8[np.ndarray, "num down across channels"],
         columns: int) -> UInt8[np.ndarray, "height width channels"]:
    """Images in rows of `columns`, two pixels apart, enlarged by a whole factor if they are small."""
    num, down, across, channels = pixels.shape
    gap = 2
    rows = -(-num // columns)
    size = rows * (down + gap) - gap, columns * (across + gap) - gap
    sheet = np.full((*size, channels), 255, dtype=np.uint8)
    for place, image in enumerate(pixels):
        top, left = place // columns * (down + gap), place % columns * (across + gap)
        sheet[top : top + down, left : left + across] = image
    factor = max(1, -(-MIN_SIDE // min(size)))
    return sheet.repeat(factor, axis=0).repeat(factor, axis=1)


def write_picture(pixels: UInt8[np.ndarray, "height width channels"], path: Path) -> None:
    """Save a picture in the format of its file name. Raises UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; choose another file, such "
                        f"as grid.png") from None
