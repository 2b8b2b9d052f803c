"""Small image files written by other means than the readers': struct, gzip and Pillow; and what reading ends in."""

import gzip
import struct

import numpy as np
from one_sentence import sentence_of
from PIL import Image

from looped.config.images import ImageConfig
from looped.data.image_sources import read_source


def idx_bytes(array, kind=8):
    """An IDX file of unsigned bytes, header packed by struct."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def random_part(num, *, seed=0, classes=4, height=5, width=6):
    """(images, labels) of random bytes."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num, height, width), dtype=np.uint8), np.arange(num, dtype=np.uint8) % classes


def write_mnist(folder, part, images, labels, *, compress=False):
    """Both files of a part under MNIST's names."""
    for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
        raw = idx_bytes(array)
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(raw) if compress else raw)


def write_picture(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def picture(number, *shape):
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def sentence(**settings):
    """The message that reading ends in."""
    return sentence_of(lambda: read_source(ImageConfig(**settings)))
