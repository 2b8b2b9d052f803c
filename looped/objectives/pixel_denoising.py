"""Class-conditional denoising of pixels, in one pass at a sampled noise level (EDM, Karras et al. 2022).

    z = y + sigma eps, loss = w(sigma) |D(z, sigma, class) - y|^2

A core of one block for all noise levels is the end-to-end baseline of several blocks with their own levels.
"""

import torch
from torch import Tensor, nn

from looped.config import Config
from looped.config.blocks import BlocksConfig
from looped.config.denoise import DenoiseConfig
from looped.data.image_batches import SoughtImages
from looped.devices import to_device
from looped.diffusion.noise import Noise, intervals
from looped.diffusion.noise_from_config import block_shares, edges_of, noise_from_config
from looped.diffusion.pixel_denoiser import PixelDenoiser
from looped.models.image_denoiser import ImageDenoiser
from looped.objectives.base import Loss, Objective
from looped.objectives.blockwise import OneBlockByLevel
from looped.objectives.denoise import ONE_BLOCK, by_bin
from looped.rng import StepRandom
from looped.tensor_types import Float, Int


class DenoisePixels(Objective):
    """The single-pass rule for images. `label_dropout`: the fraction of images whose class is hidden.

    The loss is a mean over the pixel values; with EDM's weight it starts at 1 at every level. metrics: `loss_at_max`,
    `loss_bin0`, ... by noise level.
    """

    rollout = "pixels"

    figure = short = "loss"

    @classmethod
    def from_config(cls, config: Config, model: nn.Module) -> Objective:
        return cls(model, config.denoise, config.images.label_dropout, config.blocks)

    def __init__(self, model: ImageDenoiser, config: DenoiseConfig, label_dropout: float,
                 blocks: BlocksConfig = ONE_BLOCK):
        super().__init__()
        self.config = config
        self.label_dropout = label_dropout
        self.noise: Noise = noise_from_config(config.noise)
        edges = edges_of(blocks, self.noise) if blocks.num > 1 else None
        self.denoiser: PixelDenoiser = PixelDenoiser(
            model, config.target.sigma_data or model.picture.deviation, edges=edges)

    @property
    def model(self) -> ImageDenoiser:
        return self.denoiser.model

    def forward(self, batch: SoughtImages, random: StepRandom) -> Loss:
        return self.loss_at(batch, self.noise.sample(random.stratified("sigma")), random)

    def loss_at(self, batch: SoughtImages, sigma: Float[Tensor, "batch"], random: StepRandom,
                block: int | None = None) -> Loss:
        """The loss at given levels; `block`: the block of the core to run, if there are several."""
        losses = self.losses(batch, sigma, random, block=block, labels=self.shown(batch.labels, random))
        value = losses.mean()
        return Loss(value, {"loss": value.detach()}, by_bin(self.short, sigma, losses, self.noise))

    def losses(self, batch: SoughtImages, sigma: Float[Tensor, "batch"], random: StepRandom, *,
               block: int | None = None, labels: Int[Tensor, "batch"] | None = None) -> Float[Tensor, "batch"]:
        """The weighted squared error of each image, through the block that owns its level or through `block`; `labels`:
        the classes shown to the model (None: those of the images)."""
        eps = random.normal("noise", batch.images.shape[1:])
        return self.denoiser.losses(batch.images, eps, sigma, batch.labels if labels is None else labels,
                                    weight=self.config.weight, block=block)

    def shown(self, labels: Int[Tensor, "batch"], random: StepRandom) -> Int[Tensor, "batch"]:
        """The class labels, some of them hidden (`label_dropout`)."""
        hidden = to_device(random.uniform("class hidden", ()) < self.label_dropout, labels.device)
        return torch.where(hidden, self.model.num_classes, labels)

    @property
    def reading_layers(self) -> float:
        """Mean number of core layers that a training step runs."""
        return sum(self.model.core_layers)

    def layer_forwards(self) -> float:
        return 3.0 * self.reading_layers


class BlockwisePixels(OneBlockByLevel, DenoisePixels):
    """`DenoisePixels` with one block per step."""

    def __init__(self, model: ImageDenoiser, config: DenoiseConfig, label_dropout: float, blocks: BlocksConfig):
        super().__init__(model, config, label_dropout, blocks)
        self.setup_block_sampling(blocks, block_shares(blocks, self.noise),
                                  intervals(self.denoiser.edges, blocks.overlap))
