"""Data augmentation of training images: random mirroring and RandAugment.

RandAugment (Cubuk et al. 2020, arXiv 1909.13719) draws `num_ops` of fourteen operations uniformly with replacement and
applies all at one magnitude. Operations, scales and the random sign are those of torchvision's `RandAugment`, with the
same Pillow calls; pixels from outside the image are black.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from looped.config.images import MAX_MAGNITUDE
from looped.tensor_types import UInt8

Pixels = UInt8[np.ndarray, "height width channels"]


class Operation(NamedTuple):
    """`apply(image, by)`: `by` runs from 0 to `most` over the magnitudes; if `signed`, it is negative half the time."""

    apply: Callable[[Image.Image, float], Image.Image]
    most: float = 0.0
    signed: bool = False


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Affine warp: pixel (x, y) is the input pixel nearest to (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


OPERATIONS: dict[str, Operation] = {
    "Identity": Operation(lambda image, _: image),
    "ShearX": Operation(lambda image, by: _affine(image, 1, by, 0, 0, 1, 0), 0.3, True),
    "ShearY": Operation(lambda image, by: _affine(image, 1, 0, 0, by, 1, 0), 0.3, True),
    # In pixels of a 331 x 331 image, AutoAugment's size, rescaled to this image and truncated to whole pixels.
    "TranslateX": Operation(lambda image, by: _affine(image, 1, 0, -int(by * image.width / 331), 0, 1, 0), 150, True),
    "TranslateY": Operation(lambda image, by: _affine(image, 1, 0, 0, 0, 1, -int(by * image.height / 331)), 150, True),
    "Rotate": Operation(lambda image, by: image.rotate(by), 30.0, True),  # degrees, counter-clockwise
    "Brightness": Operation(lambda image, by: ImageEnhance.Brightness(image).enhance(1 + by), 0.9, True),
    "Color": Operation(lambda image, by: ImageEnhance.Color(image).enhance(1 + by), 0.9, True),
    "Contrast": Operation(lambda image, by: ImageEnhance.Contrast(image).enhance(1 + by), 0.9, True),
    "Sharpness": Operation(lambda image, by: ImageEnhance.Sharpness(image).enhance(1 + by), 0.9, True),
    "Posterize": Operation(lambda image, by: ImageOps.posterize(image, 8 - round(by)), 4.0),
    # Inverts levels from a threshold up. The threshold starts at 255, so magnitude 0 only turns white to black.
    "Solarize": Operation(lambda image, by: ImageOps.solarize(image, 255 - by), 255.0),
    "AutoContrast": Operation(lambda image, _: ImageOps.autocontrast(image)),
    "Equalize": Operation(lambda image, _: ImageOps.equalize(image)),
}


def apply_operation(name: str, image: Image.Image, magnitude: int, *, negative: bool = False) -> Image.Image:
    """One operation at a magnitude of 0 ... `MAX_MAGNITUDE`, on an image of mode L or RGB; the input is left alone."""
    operation = OPERATIONS[name]
    by = float(torch.linspace(0, operation.most, MAX_MAGNITUDE + 1)[magnitude])  # in torchvision's own rounding
    return operation.apply(image, -by if negative and operation.signed else by)


def mirror(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """The image, flipped left to right with probability 1/2."""
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def rand_augment(pixels: Pixels, rng: np.random.Generator, *, num_ops: int, magnitude: int) -> Pixels:
    """The image after `num_ops` operations drawn with `rng`; one channel is grey, three are RGB."""
    height, width, channels = pixels.shape
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if channels == 1 else pixels))
    names = tuple(OPERATIONS)
    for _ in range(num_ops):
        which, negative = rng.integers(len(names)), rng.integers(2)  # always draw both, whatever the operation
        image = apply_operation(names[which], image, magnitude, negative=bool(negative))
    return np.asarray(image).reshape(height, width, channels)
