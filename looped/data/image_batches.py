"""Labelled images as batches of patches, to classify or to generate (`images.goal`): the class is predicted in a row
before the given patches, or all patches are predicted for a given class."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from looped.config.images import ImageConfig
from looped.data.batch import Batch
from looped.data.images import ImageBatch, ImageData, ImageStream, Normalizer, prepare_images
from looped.errors import UserError
from looped.tensor_types import Int


@dataclass(frozen=True)
class SoughtImages(ImageBatch):
    """Images to generate, `num_rows` patches each, given their classes."""

    num_rows: int

    @property
    def num_tokens(self) -> int:
        """Rows (patches) of all images."""
        return len(self) * self.num_rows


@dataclass(frozen=True)
class ImageSpec:
    """The size of images and of their square patches; deviation: the standard deviation of the normalised pixels.
    Raises UserError if the patches do not tile the images."""

    channels: int
    height: int
    width: int
    patch: int
    deviation: float = 1.0

    def __post_init__(self) -> None:
        if self.height % self.patch or self.width % self.patch:
            whole = [size for size in range(1, min(self.height, self.width) + 1)
                     if self.height % size == self.width % size == 0]
            raise UserError(f"model.patch_size {self.patch} does not divide images of {self.height} x {self.width}; "
                            f"take one of {', '.join(map(str, whole))}")

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches (vertically, horizontally)."""
        return self.height // self.patch, self.width // self.patch

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)

    @property
    def num_rows(self) -> int:
        """Rows of a sequence: the class row and the patches."""
        return 1 + self.num_patches

    @property
    def patch_numbers(self) -> int:
        """Numbers per patch."""
        return self.channels * self.patch**2

    def positions(self) -> Int[Tensor, "rows 2"]:
        """Coordinates of the rows: the class at (0, 0), a patch at (row + 1, column + 1)."""
        down, across = self.grid
        patches = torch.cartesian_prod(torch.arange(1, down + 1), torch.arange(1, across + 1))
        return torch.cat([torch.zeros(1, 2, dtype=torch.long), patches])

    def ask(self, images: ImageBatch) -> Batch:
        """A classification batch: row 0 is scored, and attention is full."""
        targets = torch.zeros(len(images), self.num_rows, dtype=torch.long)
        targets[:, 0] = images.labels
        scored = torch.zeros(len(images), self.num_rows, dtype=torch.bool)
        scored[:, 0] = True
        return Batch(images.images, targets, scored, positions=self.positions().expand(len(images), -1, -1),
                     causal=False)

    def seek(self, images: ImageBatch) -> SoughtImages:
        """A generation batch: the patches are predicted, given the classes."""
        return SoughtImages(images.images, images.labels, self.num_patches)

    def batch(self, images: ImageBatch, goal: str) -> Batch | SoughtImages:
        """The batch for a goal of `images.goal`."""
        return {"classify": self.ask, "generate": self.seek}[goal](images)


@dataclass(frozen=True)
class LabelledStream:
    """Training images in an order that is a function of (seed, step); same interface as `ProblemStream`."""

    images: ImageStream
    picture: ImageSpec

    def batch(self, step: int, *, batch_size: int, seed: int, rows: range | None = None) -> Batch | SoughtImages:
        """The given rows (all by default) of the batch of an optimiser step, counted from 0."""
        images = self.images.batch(step, batch_size=batch_size, seed=seed, rows=rows)
        return self.picture.batch(images, self.images.config.goal)

    def describe(self, step: int, *, batch_size: int, seed: int, rows: range) -> list[str]:
        """One line per row of a batch: its image, class and item."""
        return self.images.describe(step, batch_size=batch_size, seed=seed, rows=rows)


@dataclass(frozen=True)
class LabelledData:
    """Labelled images as patches; members in common with `TextData` and `TaskData` have the same names."""

    images: ImageData
    train: LabelledStream

    tokenizer = end_of_text = None
    """No text: the classes are the tokens."""

    @property
    def picture(self) -> ImageSpec:
        return self.train.picture

    @property
    def vocab_size(self) -> int:
        return self.images.num_classes

    @property
    def fingerprint(self) -> str:
        return self.images.fingerprint

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that identify the images, by name; `means` and `deviations` normalise the channels."""
        images = self.images
        return {"source": images.source, "images": len(images.train) + len(images.heldout),
                "held-out images": len(images.heldout), "classes": list(images.class_names),
                "size": [images.channels, *images.size], "means": list(images.mean), "deviations": list(images.std),
                "contents": images.contents}

    @property
    def summary(self) -> str:
        """One line for logs."""
        down, across = self.picture.grid
        return f"{self.images.summary}; {down} x {across} patches"

    def heldout(self, batch_size: int) -> Iterator[Batch | SoughtImages]:
        """All held-out images, in order."""
        goal = self.train.images.config.goal
        return (self.picture.batch(images, goal) for images in self.images.heldout.batches(batch_size))


def prepare_labelled(config: ImageConfig, patch: int) -> LabelledData:
    """The images of a config, in patches of `patch` x `patch` pixels. Raises UserError if they cannot be loaded."""
    return cut(prepare_images(config), patch)


def cut(images: ImageData, patch: int) -> LabelledData:
    """Images cut into patches of `patch` x `patch` pixels. Raises UserError if these do not tile them."""
    picture = ImageSpec(images.channels, *images.size, patch, images.deviation)
    return LabelledData(images, LabelledStream(images.train, picture))


def rescaled(data: LabelledData, scale: Normalizer) -> LabelledData:
    """The same images with another normalisation, such as that of a model trained on other images."""
    images = data.images
    if scale == images.scale:
        return data
    streams = {"train": replace(images.train, scale=scale), "heldout": replace(images.heldout, scale=scale)}
    return cut(replace(images, **streams, scale=scale), data.picture.patch)
