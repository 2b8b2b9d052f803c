"""Block-wise denoising: a core of several blocks, of which each optimiser step trains one, on noise levels of its own.

    b ~ blocks.choose, sigma ~ p(sigma | interval of b), loss as in the rule for one block, with block b as the core

DiffusionBlocks (arXiv 2506.14202, section 3). No gradient, no activation and no optimiser state passes between blocks;
they meet in the solver, which reads each of its levels by the block that owns it. Block 0 owns the highest noise.

So a block can be trained where no other is (`blocks.alone`): each step is then what a step of all blocks is when this
one is drawn, on the same rows and noise.
"""

from typing import Any

from torch import Tensor, nn

from looped.config import Config
from looped.config.blocks import BlocksConfig
from looped.config.denoise import DenoiseConfig
from looped.diffusion.from_config import block_shares
from looped.diffusion.noise import interval, sample_between
from looped.models.language import LanguageModel
from looped.objectives.base import Loss, Objective
from looped.objectives.denoise import Denoise
from looped.objectives.one_block import OneBlock
from looped.rng import StepRandom


class OneBlockByLevel(OneBlock):
    """Mixed into a denoising rule, whose `loss_at` is called for one block a step. metrics: those of the rule, and its
    `figure` as `ce_block0`, ... of the block at work (`ce` being `short`).

    In evaluation mode the loss is that of all blocks held, each with the weight that it is drawn with.
    """

    def forward(self, batch: Any, random: StepRandom) -> Loss:
        if self.training:
            return self.loss_of(self.turn(random), batch, random)
        losses = {block: self.loss_of(block, batch, random) for block in self.blocks.held}
        metrics = {self._named(block): loss.metrics[self.figure] for block, loss in losses.items()}
        value = sum(self.shares[block].item() * loss.value for block, loss in losses.items())
        return Loss(value, {"loss": value.detach()} | metrics)

    def loss_of(self, block: int, batch: Any, random: StepRandom) -> Loss:
        """The loss of one block, whatever the others are."""
        loss = self.loss_at(batch, self.levels_of(block, random), random, block=block)
        return Loss(loss.value, loss.metrics | {self._named(block): loss.metrics[self.figure]})

    def _named(self, block: int) -> str:
        return f"{self.short}_block{block}"

    def levels_of(self, block: int, random: StepRandom) -> Tensor:
        """Noise levels (B,) of a training step of a block: of the training distribution in its interval, which
        `blocks.overlap` widens. The atom at sigma_max is block 0's, however far its neighbour's interval reaches."""
        low, high = interval(block, self.denoiser.edges, self.blocks.overlap)
        return sample_between(self.noise if block == 0 else self.noise.continuous, low, high,
                              random.stratified("sigma"))


class Blockwise(OneBlockByLevel, Denoise):
    """`denoise` for one block a step."""

    @classmethod
    def from_config(cls, config: Config, model: nn.Module) -> Objective:
        return cls(model, config.denoise, config.blocks)

    def __init__(self, model: LanguageModel, config: DenoiseConfig, blocks: BlocksConfig):
        super().__init__(model, config, blocks)
        self.take_turns(blocks, block_shares(blocks, self.noise))

    @property
    def num_codas(self) -> int:
        return 2 if self.config.context == "concat" else 1
