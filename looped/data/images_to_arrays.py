"""Images of any mode as byte arrays of one size and one number of channels. Imports no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageOps

from looped.errors import UserError
from looped.tensor_types import Int, UInt8

GREY = ("1", "L", "LA")
COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")


@dataclass(frozen=True)
class Pictures:
    """Labelled images. pixels: levels 0 ... 255, one channel (grey) or three (RGB). labels: class numbers."""

    pixels: UInt8[np.ndarray, "num height width channels"]
    labels: Int[np.ndarray, "num"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: slice | Int[np.ndarray, "some"]) -> "Pictures":
        return Pictures(self.pixels[which], self.labels[which])

    def as_colour(self) -> "Pictures":
        """The same images with three channels."""
        return self if self.pixels.shape[3] == 3 else replace(self, pixels=self.pixels.repeat(3, axis=3))


def gather(images: Iterable[tuple[str, Image.Image]], labels: Sequence[int], size: int | None) -> Pictures:
    """Named images, resized to squares of `size` if it is set; one channel if all are grey, else three.

    Transparency is dropped. Raises `UserError` for images of more than 8 bits per channel, and of unequal sizes.
    """
    arrays, first = [], ""
    for name, image in images:
        array = np.asarray(squared(_eight_bits(image, name), size))
        first = first or name
        if arrays and array.shape[:2] != arrays[0].shape[:2]:
            raise UserError(f"{name} is {_size(array)} pixels (height x width), but {first} is {_size(arrays[0])}; "
                            f"set images.size to make all of them squares of one size")
        arrays.append(array)
    if all(array.ndim == 2 for array in arrays):
        pixels = np.stack(arrays)[..., None]
    else:
        pixels = np.stack([array if array.ndim == 3 else array[..., None].repeat(3, axis=2) for array in arrays])
    return Pictures(pixels, np.asarray(labels, dtype=np.int64))


def resize_all(pixels: UInt8[np.ndarray, "num height width 1"],
               size: int | None) -> UInt8[np.ndarray, "num new_height new_width 1"]:
    """Grey images resized to squares of `size`; unchanged if it is None."""
    if size is None or pixels.shape[1:3] == (size, size):
        return pixels
    return np.stack([squared(Image.fromarray(image[..., 0]), size) for image in pixels])[..., None]


def squared(image: Image.Image, size: int | None) -> Image.Image:
    """The image with its shorter side resized to `size` (bilinear, antialiased) and its longer side centre-cropped."""
    if size is None or image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    if image.mode in GREY:
        return image.convert("L")
    if image.mode in COLOUR:
        return image.convert("RGB")
    raise UserError(f"{name} has Pillow's mode {image.mode}, whose levels do not fit 8 bits; convert it to 8 bits per "
                    f"channel")


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]} x {array.shape[1]}"
