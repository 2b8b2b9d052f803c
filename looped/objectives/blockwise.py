"""Block-wise denoising: a core of several blocks, of which each optimiser step trains one, on noise levels of its own.

    b ~ blocks.choose, sigma ~ p(sigma | interval of b), loss as in `denoise` with block b as the core

DiffusionBlocks (arXiv 2506.14202, section 3). No gradient, no activation and no optimiser state passes between blocks;
they meet in the solver, which reads each of its levels by the block that owns it. Block 0 owns the highest noise.

So a block can be trained where no other is (`blocks.alone`): each step is then what a step of all blocks is when this
one is drawn, on the same rows and noise.
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

    In evaluation mode the loss is that of all blocks held, each with the weight that it is drawn with.
    """

    def __init__(self, model: LanguageModel, config: DenoiseConfig, blocks: BlocksConfig):
        super().__init__(model, config, blocks)
        self.blocks, self.shares = blocks, block_shares(blocks, self.noise)
        self._learning = [parameter for parameter in self.shared_parameters() if parameter.requires_grad]
        self._let_shared_learn(any(map(blocks.trains_shared, blocks.held)))

    def shared_parameters(self) -> list[nn.Parameter]:
        """What is no block's own."""
        own = {id(parameter) for parameter in self.model.recurrence.core.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]

    def names_of(self, block: int) -> set[str]:
        """The names of a block's own parameters."""
        own = {id(parameter) for parameter in self.model.recurrence.core.blocks[block].parameters()}
        return {name for name, parameter in self.named_parameters() if id(parameter) in own}

    def _let_shared_learn(self, learn: bool) -> None:
        for parameter in self._learning:
            parameter.requires_grad_(learn)

    def forward(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Loss:
        batch = Batch.of(tokens)
        if self.training:
            block = self.draw(random)
            self._let_shared_learn(self.blocks.trains_shared(block))
            return self.loss_of(block, batch, random)
        losses = {block: self.loss_of(block, batch, random) for block in self.blocks.held}
        metrics = {f"ce_block{block}": loss.metrics["cross_entropy"] for block, loss in losses.items()}
        value = sum(self.shares[block].item() * loss.value for block, loss in losses.items())
        return Loss(value, {"loss": value.detach()} | metrics)

    def draw(self, random: StepRandom) -> int:
        """The block that an optimiser step trains: one for all its rows, micro-batches and processes."""
        if self.blocks.alone is not None:
            return self.blocks.alone
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
        frozen = sum(share for block, share in enumerate(self.shares.tolist()) if not self.blocks.trains_shared(block))
        codas = 2 if self.config.context == "concat" else 1
        return total - frozen * (2 * c.num_prelude_layers + codas * c.num_coda_layers)
