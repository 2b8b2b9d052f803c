"""Labelled images as training data: each step's batch is a function of (seed, step), as with text and tasks.

Row r of optimiser step s in batches of B is item s * B + r of an endless sequence that visits all training images once
per epoch, reshuffled each time. Augmentation is a function of (seed, item), so neither resuming nor splitting a batch
over processes changes a row. Images stay bytes in memory; a batch is (level / 255 - mean) / std.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from looped.config.images import ImageConfig
from looped.data.augment import mirror, rand_augment
from looped.data.corpus import place_of
from looped.data.image_sources import Source, read_source
from looped.data.images_to_arrays import Pictures
from looped.data.task import rng_of
from looped.data.token_windows import shuffled
from looped.errors import UserError
from looped.tensor_types import Float, Int, UInt8


@dataclass(frozen=True)
class ImageBatch:
    """A batch of labelled images. images: normalised, float32. labels: class numbers, int64."""

    images: Float[Tensor, "batch channels height width"]
    labels: Int[Tensor, "batch"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Int[Tensor, "rows"]) -> "ImageBatch":
        """A subset of the images."""
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "ImageBatch":
        """The images on a device; `non_blocking` as in `Tensor.to`."""
        return replace(self, images=self.images.to(device, non_blocking=non_blocking),
                       labels=self.labels.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class Normalizer:
    """Normalisation of levels 0 ... 255 to model inputs, and back; `mean` and `std` of levels / 255 per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, pixels: UInt8[np.ndarray, "batch height width channels"]
                  ) -> Float[Tensor, "batch channels height width"]:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).float() / 255 - mean) / std

    def levels(self, images: Float[Tensor, "batch channels height width"]
               ) -> UInt8[Tensor, "batch height width channels"]:
        """Levels of normalised or generated images, rounded and clipped to 0 ... 255."""
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return ((images.float() * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


@dataclass(frozen=True)
class HeldoutImages:
    """Held-out images, never augmented: `heldout[rows]` is a batch, `heldout.batches(64)` yields all in order."""

    pictures: Pictures
    scale: Normalizer

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, rows: slice | Int[np.ndarray, "rows"]) -> ImageBatch:
        part = self.pictures[rows]
        return ImageBatch(self.scale.normalise(part.pixels), torch.from_numpy(part.labels))

    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        """All images in order; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield self[start : start + batch_size]


@dataclass(frozen=True)
class ImageStream:
    """Endless stream of training images, augmented as `config` says."""

    pictures: Pictures
    scale: Normalizer
    config: ImageConfig

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, step: int, *, batch_size: int, seed: int, rows: range | None = None) -> ImageBatch:
        """The given rows (all by default) of the batch of optimiser step `step`, counted from 0."""
        rows = range(batch_size) if rows is None else rows
        part = self.pictures[shuffled(len(self), step, batch_size=batch_size, seed=seed, rows=rows)]
        pixels = part.pixels
        if self.config.flip or self.config.randaugment:
            pixels = np.empty_like(pixels)
            for place, row in enumerate(rows):
                pixels[place] = self._varied(part.pixels[place], seed, step * batch_size + row)
        return ImageBatch(self.scale.normalise(pixels), torch.from_numpy(part.labels))

    def describe(self, step: int, *, batch_size: int, seed: int, rows: range) -> list[str]:
        """One line per row of a batch: its image, class and item."""
        places = shuffled(len(self), step, batch_size=batch_size, seed=seed, rows=rows)
        return [f"row {row}: training image {place} (class {self.pictures.labels[place]}), item "
                f"{step * batch_size + row} of seed {seed}" for row, place in zip(rows, places.tolist(), strict=True)]

    def _varied(self, pixels: np.ndarray, seed: int, item: int) -> np.ndarray:
        rng = rng_of("image", seed, item)
        if self.config.flip:
            pixels = mirror(pixels, rng)
        if self.config.randaugment:
            pixels = rand_augment(pixels, rng, num_ops=self.config.randaugment_ops,
                                  magnitude=self.config.randaugment_magnitude)
        return pixels


@dataclass(frozen=True)
class ImageData:
    """Training and held-out images; members in common with `TextData` and `TaskData` have the same names.

    size: (height, width). fingerprint: hash of images, classes, split and settings; runs with equal fingerprints see
    the same images.
    """

    train: ImageStream
    heldout: HeldoutImages
    class_names: tuple[str, ...]
    scale: Normalizer
    fingerprint: str
    source: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.train.pictures.pixels.shape[3]

    @property
    def size(self) -> tuple[int, int]:
        return self.train.pictures.pixels.shape[1:3]

    @property
    def mean(self) -> tuple[float, ...]:
        return self.scale.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.scale.std

    @cached_property
    def contents(self) -> str:
        """A short hash of images and classes, whatever their preprocessing."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        _add(digest, self.train.pictures, self.heldout.pictures)
        return digest.hexdigest()[:16]

    @property
    def deviation(self) -> float:
        """Standard deviation of the normalised training images, over all channels."""
        mean, std = _moments(self.train.pictures)
        mean, std = (mean - self.mean) / self.std, std / self.std
        return float(np.sqrt((std**2 + mean**2).mean() - mean.mean() ** 2)) or 1.0

    @property
    def summary(self) -> str:
        """One line for logs."""
        height, width = self.size
        return (f"{self.source}: {len(self.train):,} training images, {len(self.heldout):,} held out, "
                f"{self.num_classes} classes, {height} x {width} pixels, {'grey' if self.channels == 1 else 'RGB'}")


def prepare_images(config: ImageConfig) -> ImageData:
    """The training and held-out images of a config. Raises `UserError` if they cannot be loaded."""
    source = read_source(config)
    train, heldout = split(source, config.heldout) if source.test is None else (source.train, source.test)
    train, heldout = some(train, config.max_train), some(heldout, config.max_heldout)
    scale = measure(train) if config.normalise == "standard" else symmetric(train.pixels.shape[3])
    return ImageData(ImageStream(train, scale, config), HeldoutImages(heldout, scale), source.class_names, scale,
                     _fingerprint(config, train, heldout, source.class_names), source.name)


def split(source: Source, share: float) -> tuple[Pictures, Pictures]:
    """(train, held-out): the images whose indices have the lowest hashes are held out, whatever their sorting.

    Raises `UserError` if there is only one image.
    """
    count = len(source.train)
    if count < 2:
        raise UserError(f"{source.name} holds one image, but images.heldout {share} needs another to hold out; "
                        f"give more images")
    num = min(max(round(share * count), 1), count - 1)
    order = by_hash(count)
    return source.train[np.sort(order[num:])], source.train[np.sort(order[:num])]


def some(pictures: Pictures, most: int | None) -> Pictures:
    """At most `most` images, whatever their sorting: those whose indices have the highest hashes."""
    return pictures if most is None or len(pictures) <= most else pictures[np.sort(by_hash(len(pictures))[-most:])]


def by_hash(count: int) -> Int[np.ndarray, "count"]:
    """The indices below `count`, sorted by hash: a fixed pseudo-random permutation."""
    return np.argsort([place_of(str(number)) for number in range(count)], kind="stable")


def measure(pictures: Pictures) -> Normalizer:
    """Mean and standard deviation of each channel; a constant channel keeps std 1."""
    mean, std = _moments(pictures)
    return Normalizer(tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist()))


def _moments(pictures: Pictures) -> tuple[np.ndarray, np.ndarray]:
    """Exact mean and standard deviation of levels / 255 per channel, from counts of the levels."""
    channels = pictures.pixels.shape[3]
    counts = np.zeros((channels, 256), dtype=np.int64)
    for start in range(0, len(pictures), 1024):  # bincount casts its input to int64
        part = pictures.pixels[start : start + 1024]
        counts += [np.bincount(part[..., channel].ravel(), minlength=256) for channel in range(channels)]
    level, share = np.arange(256) / 255, counts / counts.sum(1, keepdims=True)
    mean = share @ level
    return mean, np.sqrt((share * (level - mean[:, None]) ** 2).sum(1))


def symmetric(channels: int) -> Normalizer:
    """The scale that maps levels 0 ... 255 to [-1, 1]."""
    return Normalizer((0.5,) * channels, (0.5,) * channels)


def _fingerprint(config: ImageConfig, train: Pictures, heldout: Pictures, class_names: tuple[str, ...]) -> str:
    settings = config.model_dump(mode="json", include={"flip", "randaugment", "randaugment_ops",
                                                       "randaugment_magnitude", "normalise"})
    digest = hashlib.sha256(json.dumps([settings, class_names], sort_keys=True).encode())
    _add(digest, train, heldout)
    return digest.hexdigest()[:32]


def _add(digest, *parts: Pictures) -> None:
    """Add images and labels to a hash."""
    for pictures in parts:
        digest.update(repr(pictures.pixels.shape).encode())
        digest.update(np.ascontiguousarray(pictures.pixels))
        digest.update(np.ascontiguousarray(pictures.labels, dtype="<i8"))
