"""Looped Vision Transformer, an image classifier: a class row before the patches of an image predicts its class.

`encode` cuts the image into patches (Dosovitskiy et al. 2021, arXiv 2010.11929) instead of embedding tokens; the rest
is the language model, with the classes as vocabulary. A patch has position (row + 1, column + 1), the class row (0, 0).
So every training rule of the toolkit trains a classifier; denoising adds noise to the class row alone.
"""

import math

import torch
from torch import Tensor, nn

from looped.config import Config
from looped.config.model import ModelConfig
from looped.data.image_batches import ImageSpec
from looped.models.language import PLAIN_LOOP, LanguageModel, State, Structure
from looped.nn.blocks import run_layers
from looped.nn.projection import cast_for
from looped.nn.rows import PLAIN, Rows
from looped.tensor_types import Float

Images = Float[Tensor, "batch channels down across"]


def cut(images: Images, patch: int) -> Float[Tensor, "batch patches size"]:
    """Square patches from left to right and from top to bottom, each as its channels' pixels in reading order."""
    B, C, height, width = images.shape
    grid = images.reshape(B, C, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch * patch)  # B N (C p p)


def join(patches: Float[Tensor, "batch patches size"], picture: ImageSpec) -> Images:
    """Inverse of `cut`: the images of these patches."""
    (down, across), C, p = picture.grid, picture.channels, picture.patch
    grid = patches.reshape(-1, down, across, C, p, p)  # B (h w) (C p p) -> B h w C p p
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, C, picture.height, picture.width)


class ImageClassifier(LanguageModel):
    """A `LanguageModel` with `num_classes` classes as its tokens; `encode` takes images."""

    def __init__(self, config: ModelConfig, num_classes: int, picture: ImageSpec, structure: Structure = PLAIN_LOOP):
        super().__init__(config, num_classes, structure)
        self.picture = picture
        self.patches: nn.Linear = nn.Linear(picture.patch_numbers, config.width)
        self._start_patches()
        self.class_row: nn.Parameter = nn.Parameter(torch.zeros(config.width))

    @classmethod
    def of_data(cls, config: Config, vocab_size: int, picture: ImageSpec, structure: Structure) -> "ImageClassifier":
        """The model of a config for images of `vocab_size` classes."""
        return cls(config.model, vocab_size, picture, structure)

    def _start_patches(self) -> None:
        """Initialise the patch embedding: unit-variance pixels give rows on the scale of embedded tokens."""
        nn.init.normal_(self.patches.weight, std=math.sqrt(2 / (5 * self.patches.in_features)))
        nn.init.zeros_(self.patches.bias)

    def start_shared(self, effective_depth: int) -> None:
        super().start_shared(effective_depth)
        self._start_patches()

    def encode(self, tokens: Images, rows: Rows = PLAIN) -> State:
        """The prelude's output `e` for images, with the class row first."""
        patches = self.patches(cast_for(self.patches, cut(tokens, self.picture.patch)))
        x = torch.cat([self.class_row.to(patches.dtype).expand(len(patches), 1, -1), patches], dim=1)
        return run_layers(self.prelude, x, None, self.placed(x, rows).at("prelude"))
