"""Block-wise denoising: a core of several blocks, of which each optimiser step trains one, on noise levels of its own.

    b ~ blocks.choose, sigma ~ p(sigma | interval of b), loss as in `denoise` with block b as the core

DiffusionBlocks (arXiv 2506.14202, section 3). No gradient, no activation and no optimiser state passes between blocks;
they meet in the solver, which reads each of its levels by the block that owns it. Block 0 owns the highest noise.
"""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from looped.config_blocks import BlocksConfig
from looped.config_denoise import DenoiseConfig
from looped.data.batch import Batch
from looped.diffusion.noise import block_shares, interval, sample_between
from looped.models.language import LanguageModel
from looped.objectives.base import Loss
from looped.objectives.denoise import Denoise
from looped.rng import StepRandom


class Blockwise(Denoise):
    """`denoise` for one block a step. metrics: those of `denoise`, and `ce_block0`, ... of the block at work.

    In evaluation mode the loss is that of all blocks, each with the weight that it is drawn with.
    """

    def __init__(self, model: LanguageModel, config: DenoiseConfig, blocks: BlocksConfig):
        super().__init__(model, config, blocks)
        self.blocks, self.shares = blocks, block_shares(blocks, self.noise)
        if blocks.shared == "frozen":
            for parameter in self.shared_parameters():
                parameter.requires_grad_(False)

    def shared_parameters(self) -> list[nn.Parameter]:
        """What is no block's own."""
        own = {id(parameter) for parameter in self.model.recurrence.core.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]

    def forward(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Loss:
        batch = Batch.of(tokens)
        if self.training:
            return self.loss_of(self.draw(random), batch, random)
        losses = [self.loss_of(block, batch, random) for block in range(self.blocks.num)]
        metrics = {f"ce_block{block}": loss.metrics["cross_entropy"] for block, loss in enumerate(losses)}
        value = sum(share * loss.value for share, loss in zip(self.shares.tolist(), losses, strict=True))
        return Loss(value, {"loss": value.detach()} | metrics)

    def draw(self, random: StepRandom) -> int:
        """The block that an optimiser step trains: one for all its rows, micro-batches and processes."""
        return int(torch.multinomial(self.shares, 1, generator=random.lockstep("block")))

    def loss_of(self, block: int, batch: Batch, random: StepRandom) -> Loss:
        """The loss of one block, whatever the others are."""
        loss = self.loss_at(batch, self.levels_of(block, random), random, block=block)
        return Loss(loss.value, loss.metrics | {f"ce_block{block}": loss.metrics["cross_entropy"]})

    def levels_of(self, block: int, random: StepRandom) -> Tensor:
        """Noise levels (B,) of a training step of a block: of the training distribution in its interval, which
        `blocks.overlap` widens. The atom at sigma_max is block 0's, however far its neighbour's interval reaches."""
        low, high = interval(block, self.denoiser.edges, self.blocks.overlap)
        return sample_between(self.noise if block == 0 else self.noise.continuous, low, high,
                              random.stratified("sigma"))

    @property
    def reading_layers(self) -> float:
        return sum(share * layers for share, layers in zip(self.shares.tolist(), self.model.core_layers, strict=True))

    def layer_forwards(self) -> float:
        """Nothing goes back through a frozen prelude, and through a frozen coda to its input alone."""
        c, total = self.model.config, super().layer_forwards()
        if self.blocks.shared == "trained":
            return total
        codas = 2 if self.config.context == "concat" else 1
        return total - 2 * c.num_prelude_layers - codas * c.num_coda_layers
