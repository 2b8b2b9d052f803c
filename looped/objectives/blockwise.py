"""Block-wise denoising: each optimiser step trains one of several blocks of the core, on that block's noise levels.

    b ~ blocks.choose, sigma ~ p(sigma | interval of b), loss as in `denoise`, with block b as the core

DiffusionBlocks (arXiv 2506.14202, section 3). No gradients, activations or optimiser state pass between blocks; only
the solver combines them: it evaluates each level with the block that owns it. Block 0 owns the highest noise.

So a block can be trained without the others (`blocks.alone`): each step then equals the step of joint training in which
this block is drawn, on the same data and noise.

With `denoise.carry latent` the blocks share a latent instead: in half of the steps of block b, the blocks above it run
once in turn, without gradient, each at a level of its own on the way of z down to sigma, and hand their output on as a
solver of one step per block does. Gradients, activations and optimiser state still belong to one block.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from looped.config import Config
from looped.config.blocks import BlocksConfig
from looped.config.denoise import DenoiseConfig
from looped.data.batch import Batch
from looped.diffusion.noise import intervals, sample_between
from looped.diffusion.noise_from_config import block_shares
from looped.diffusion.samplers import ancestral_step
from looped.models.language import LanguageModel
from looped.nn.rows import Rows
from looped.objectives.active_block import OneBlock
from looped.objectives.base import Loss, Objective, rows_of_batch
from looped.objectives.denoise import Denoise, only_sought, reads_first
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

    def levels_of(self, block: int, random: StepRandom, stream: str = "sigma") -> Tensor:
        """Noise levels (B,) for a training step of a block: the training distribution in the block's interval, which
        `blocks.overlap` widens. The atom at sigma_max belongs to block 0 even if other intervals reach it."""
        return sample_between(self.noise if block == 0 else self.noise.continuous, *self.intervals[block],
                              random.stratified(stream))


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
    def hands_latents_on(self) -> bool:
        """True if the output of a block goes to the next one (`denoise.carry latent`)."""
        return self.config.carry == "latent"

    def _start(self, e: Tensor, batch: Batch, target: Tensor, sigma: Tensor, random: StepRandom,
               rows: Rows) -> tuple[Tensor, Tensor | None]:
        """z at `sigma` and, under a shared latent, the output of the blocks above the active one on z's way there."""
        if not self.hands_latents_on:
            return super()._start(e, batch, target, sigma, random, rows)
        if not reads_first(random):
            return self._noised(target, batch, sigma, random), None
        with torch.no_grad():
            levels = self._levels_down_to(rows.block, sigma, random)
            z, carry = self._noised(target, batch, levels[0], random), None
            for block, (level, lower) in enumerate(itertools.pairwise(levels)):
                above = self.noisy_rows(e, batch, rows_of_batch(batch).having(block=block))
                carry = self.denoiser.passed_on(z, level, e, above, carry=carry)
                noise = random.normal(f"noise below block {block}", target.shape[1:])
                z = only_sought(ancestral_step(z, target, level, lower, noise), batch)
        return z, carry

    def _levels_down_to(self, block: int, sigma: Tensor, random: StepRandom) -> list[Tensor]:
        """A level of each block above this one, and `sigma`: falling, also where `blocks.overlap` lets intervals meet.
        """
        levels = [sigma]
        for above in reversed(range(block)):
            levels.append(torch.maximum(self.levels_of(above, random, f"sigma of block {above}"), levels[-1]))
        return levels[::-1]

    @property
    def first_layers(self) -> float:
        if not self.hands_latents_on:
            return super().first_layers
        above = sum(share * self.layers_before(block) for block, share in enumerate(self.shares.tolist()))
        return self.first_readings * above

    def layers_before(self, block: int) -> int:
        if not self.hands_latents_on:
            return 0
        above = self.model.core_layers[:block]
        clean = 0
        if self.config.context == "concat":
            clean = sum(self.denoiser.clean_layers[:block]) + block * self.clean_coda_layers
        return sum(above) + clean

    @property
    def coda_layers(self) -> int:
        return self.model.num_coda_layers + self.clean_coda_layers
