"""Block-wise denoising: each optimiser step trains one of several blocks of the core, on that block's noise levels.

    b ~ blocks.choose, sigma ~ p(sigma | interval of b), loss as in `denoise`, with block b as the core

DiffusionBlocks (arXiv 2506.14202, section 3). No gradients, activations or optimiser state pass between blocks; only
the solver combines them: it evaluates each level with the block that owns it. Block 0 owns the highest noise.

So a block can be trained without the others (`blocks.alone`): each step then equals the step of joint training in which
this block is drawn, on the same data and noise.
"""

from typing import Any

from torch import Tensor, nn

from looped.config import Config
from looped.config.blocks import BlocksConfig
from looped.config.denoise import DenoiseConfig
from looped.diffusion.noise import intervals, sample_between
from looped.diffusion.noise_from_config import block_shares
from looped.models.language import LanguageModel
from looped.objectives.active_block import OneBlock
from looped.objectives.base import Loss, Objective
from looped.objectives.denoise import Denoise
from looped.rng import StepRandom


class OneBlockByLevel(OneBlock):
    """Mixin for a denoising rule: calls its `loss_at` for one block per step. metrics: those of the rule, and its
    `figure` for the active block as `ce_block0`, ... (`ce` is `short`).

    In evaluation mode the loss is a sum over all held blocks, each weighted by the probability of drawing it.
    """

    def forward(self, batch: Any, random: StepRandom) -> Loss:
        if self.training:
            return self.loss_of(self.activate_block(random), batch, random)
        losses = {block: self.loss_of(block, batch, random) for block in self.blocks.held}
        metrics = {self._named(block): loss.metrics[self.figure] for block, loss in losses.items()}
        value = sum(self.shares[block].item() * loss.value for block, loss in losses.items())
        return Loss(value, {"loss": value.detach()} | metrics)

    def loss_of(self, block: int, batch: Any, random: StepRandom) -> Loss:
        """The loss of one block, independent of the others."""
        loss = self.loss_at(batch, self.levels_of(block, random), random, block=block)
        return Loss(loss.value, loss.metrics | {self._named(block): loss.metrics[self.figure]}, loss.shares)

    def _named(self, block: int) -> str:
        return f"{self.short}_block{block}"

    def levels_of(self, block: int, random: StepRandom) -> Tensor:
        """Noise levels (B,) for a training step of a block: the training distribution in the block's interval, which
        `blocks.overlap` widens. The atom at sigma_max belongs to block 0 even if other intervals reach it."""
        return sample_between(self.noise if block == 0 else self.noise.continuous, *self.intervals[block],
                              random.stratified("sigma"))


class Blockwise(OneBlockByLevel, Denoise):
    """`denoise` with one block per step."""

    @classmethod
    def from_config(cls, config: Config, model: nn.Module) -> Objective:
        return cls(model, config.denoise, config.blocks)

    def __init__(self, model: LanguageModel, config: DenoiseConfig, blocks: BlocksConfig):
        super().__init__(model, config, blocks)
        self.setup_block_sampling(blocks, block_shares(blocks, self.noise),
                                  intervals(self.denoiser.edges, blocks.overlap))

    @property
    def num_codas(self) -> int:
        return 2 if self.config.context == "concat" else 1
