"""What a benchmark feeds a training step: tokens or images at random, of the sizes that a config names."""

import torch
from jaxtyping import Int
from torch import Tensor

from looped.config import Config
from looped.data.batch import Batch
from looped.data.images import ImageBatch
from looped.data.labelled import SoughtImages
from looped.data.opening import open_data
from looped.objectives.flops import picture_of
from looped.rng import generator


def vocab_of(config: Config) -> int:
    """Tokens, or the classes of the images."""
    return open_data(config).vocab_size if config.is_images else config.data.vocab_size


def random_inputs(config: Config) -> Int[Tensor, "batch length_and_one"] | Batch | SoughtImages:
    """A whole batch, the same on every call."""
    gen, num, picture = generator(config.seed, "bench"), config.training.batch_size, picture_of(config)
    if picture is None:
        return torch.randint(vocab_of(config), (num, config.data.length + 1), generator=gen)
    images = torch.randn((num, picture.channels, picture.height, picture.width), generator=gen)
    batch = ImageBatch(images, torch.randint(vocab_of(config), (num,), generator=gen))
    return picture.batch(batch, config.images.goal)
