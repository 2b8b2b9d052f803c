"""Image features for distances: pixels, or the last hidden row of a trained classifier.

Their name is reported with every figure. They are not Inception's, so distances in them are not the published FID.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from looped.config import Config
from looped.data.image_batches import ImageSpec
from looped.data.images import ImageBatch, Normalizer
from looped.errors import UserError
from looped.inference.rollout import rollout_of
from looped.objectives.base import Objective
from looped.tensor_types import Float, Int, UInt8

Levels = UInt8[Tensor, "num down across channels"]
PIXELS = "pixels"


@dataclass(frozen=True)
class Features:
    """A feature extractor. `name`: shown with every figure; `of`: levels 0 ... 255 of images -> (images, dimension)."""

    name: str
    of: Callable[[Levels], Float[Tensor, "_ _"]]


def pixel_features() -> Features:
    """The pixel levels, scaled to [0, 1]."""
    return Features(PIXELS, lambda levels: levels.flatten(1).float() / 255)


def classifier_features(name: str, objective: Objective, config: Config, scale: Normalizer, picture: ImageSpec,
                        batch_size: int = 256) -> Features:
    """The head's input at the class row of a trained classifier. `scale`: of the classifier's own images; `picture`:
    the images to measure. Raises UserError if the model is no classifier of such images."""
    model = objective.model
    if not config.kind.names_classes:
        raise UserError(f"--features {name} is no image classifier; give it the run of a classifier of the same images "
                        f"(images.goal classify), or leave it out to use pixels as features")
    theirs, ours = ((p.channels, p.height, p.width) for p in (model.picture, picture))
    if theirs != ours:
        raise UserError(f"--features {name} takes images of {theirs[1]} x {theirs[2]} pixels in {theirs[0]} channels, "
                        f"and these are {ours[1]} x {ours[2]} in {ours[0]}; give it a classifier of the same images")

    @torch.no_grad()
    def of(levels: Levels) -> Float[Tensor, "_ _"]:
        device = next(model.parameters()).device
        parts = (scale.normalise(part.numpy()).to(device) for part in levels.split(batch_size))
        return torch.cat([class_rows(objective, images, config.main_depth).cpu() for images in parts])

    return Features(name, of)


def class_rows(objective: Objective, images: Float[Tensor, "num channels down across"],
               depth: int) -> Float[Tensor, "num width"]:
    """The last hidden state of the class row: of a loop after `depth` steps; of a denoiser at its highest noise level
    with z = 0, which carries no information on the class."""
    batch = objective.model.picture.ask(ImageBatch(images, _no_labels(images))).to(images.device)
    return rollout_of(objective).hidden(batch, depth, torch.zeros_like)[:, 0].float()


def _no_labels(images: Tensor) -> Int[Tensor, "num"]:
    return torch.zeros(len(images), dtype=torch.long, device=images.device)
