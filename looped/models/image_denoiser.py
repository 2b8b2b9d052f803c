"""Diffusion Transformer for images: from the patches of a noisy image, the pixels of each patch.

DiT (Peebles & Xie 2022, arXiv 2212.09748): the noise level and the class condition every layer by AdaLN, and also the
norm before the output projection, which starts at zero. Differences are this toolkit's layers (RMSNorm, rotary
positions by row and column, SwiGLU, gates that start at one) and a learned table of positions. Rotary angles alone
could not identify a patch while all patches look alike, as they do under high noise.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from looped.config import Config
from looped.config.model import ModelConfig
from looped.data.image_batches import ImageSpec
from looped.devices import to_device
from looped.models.language import Level, Structure, loop_of, rotary_of, start_around, start_weights
from looped.models.vision import Images, cut, join
from looped.nn.conditioning import LevelEmbedding
from looped.nn.layers import RMSNorm, Rotary
from looped.nn.masks import Full
from looped.nn.projection import cast_for
from looped.nn.recurrence import RecurrentDepth
from looped.nn.rows import Rows
from looped.tensor_types import Float, Int

EVERYBODY = Full()


class ImageDenoiser(nn.Module):
    """`(images, level, labels) -> images`. Label `num_classes` means no class; the structure needs a `cond_width`.
    """

    def __init__(self, config: ModelConfig, num_classes: int, picture: ImageSpec, structure: Structure):
        super().__init__()
        self.config = config
        self.picture = picture
        self.num_classes = num_classes
        self.width: int = config.width
        self.num_prelude_layers = self.num_coda_layers = 0
        sizes = structure.core_layers or (config.num_core_layers,)
        self.core_layers: tuple[int, ...] = tuple(config.layer_runs * layers for layers in sizes)
        size, cond_width = picture.patch_numbers, structure.cond_width
        self.patches: nn.Linear = nn.Linear(size, config.width)
        self.place: nn.Parameter = nn.Parameter(torch.zeros(picture.num_patches, config.width))
        self.level_embedding: LevelEmbedding = LevelEmbedding(cond_width)
        self.classes: nn.Embedding = nn.Embedding(num_classes + 1, cond_width)
        self.recurrence: RecurrentDepth = loop_of(config, structure)
        self.norm: RMSNorm = RMSNorm(config.width, eps=config.norm_eps)
        self.last_modulation: nn.Linear = nn.Linear(cond_width, 2 * config.width)
        self.pixels: nn.Linear = nn.Linear(config.width, size)
        self.rotary: Rotary = rotary_of(config)
        start_weights(self, config.width, structure.effective_depth or config.num_core_layers)
        self._start_ends()

    @classmethod
    def of_data(cls, config: Config, vocab_size: int, picture: ImageSpec, structure: Structure) -> "ImageDenoiser":
        """The model of a config with `vocab_size` classes."""
        return cls(config.model, vocab_size, picture, structure)

    def start_shared(self, effective_depth: int) -> None:
        """Initialise all but the core in place, with draws that do not depend on the core."""
        start_around(self, effective_depth)
        self._start_ends()

    def _start_ends(self) -> None:
        """Initialise the projections: unit-variance pixels give rows on the scale of embedded tokens; outputs are 0."""
        nn.init.normal_(self.patches.weight, std=math.sqrt(2 / (5 * self.patches.in_features)))
        for last in (self.last_modulation, self.pixels):
            nn.init.zeros_(last.weight)

    def forward(self, images: Images, level: Level, labels: Int[Tensor, "batch"], *,
                block: int | None = None) -> Images:
        """The network's output, as images. `block`: the active block of the core; None: the first."""
        cond = self.level_embedding(level) + self.classes(labels)
        x = self.patches(cast_for(self.patches, cut(images, self.picture.patch))) + self.place
        rows = Rows(mask=EVERYBODY, rotation=self.rotary(self._positions(x)))
        x = self.recurrence.step(x, x, cond, rows, block=block)
        return join(self.pixels(self._modulated(x, cond)), self.picture)

    def _positions(self, x: Tensor) -> Int[Tensor, "1 patches 2"]:
        return to_device(self.picture.positions()[None, 1:], x.device)

    def _modulated(self, x: Float[Tensor, "batch patches width"],
                   cond: Float[Tensor, "batch cond"]) -> Float[Tensor, "batch patches width"]:
        shift, scale = self.last_modulation(silu(cond)).unsqueeze(1).chunk(2, dim=-1)
        return self.norm(x, scale=scale, shift=shift)

    def compile_step(self) -> None:
        """Compile one step of the core."""
        self.recurrence.compile_step()
