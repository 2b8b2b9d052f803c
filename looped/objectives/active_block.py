"""Training one block of the core per step: sampling the active block, freezing shared parameters, and the cost
(DiffusionBlocks, arXiv 2506.14202, section 3)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from looped.config.blocks import BlocksConfig
from looped.objectives.base import Objective
from looped.rng import StepRandom
from looped.tensor_types import Float64


class OneBlock(Objective):
    """Mixin for a rule whose network evaluations each run one block; its constructor calls `setup_block_sampling`."""

    def setup_block_sampling(self, blocks: BlocksConfig, shares: Float64[Tensor, "blocks"],
                             intervals: list[tuple[float, float]] | None = None) -> None:
        """shares: the fraction of training steps that train each block. intervals: the (lowest, highest) noise or mask
        level that each trains on."""
        self.blocks = blocks
        self.shares = shares
        self.intervals: list[tuple[float, float]] = intervals or []
        self._trainable_shared = [parameter for parameter in self.shared_parameters() if parameter.requires_grad]
        self._train_shared(any(map(blocks.trains_shared, blocks.held)))

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters that belong to no block."""
        own = {id(parameter) for parameter in self.model.recurrence.core.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]

    def own_parameters(self, block: int) -> list[nn.Parameter]:
        return list(self.model.recurrence.core.blocks[block].parameters())

    def names_of(self, block: int) -> set[str]:
        """The names of a block's own parameters."""
        own = {id(parameter) for parameter in self.own_parameters(block)}
        return {name for name, parameter in self.named_parameters() if id(parameter) in own}

    def _train_shared(self, train: bool) -> None:
        for parameter in self._trainable_shared:
            parameter.requires_grad_(train)

    def sample_block(self, random: StepRandom) -> int:
        """The block that an optimiser step trains: one for all its rows, micro-batches and processes."""
        if self.blocks.alone is not None:
            return self.blocks.alone
        return random.decide(
            "block", lambda step: int(torch.multinomial(self.shares, 1, generator=step.lockstep("block"))))

    def decisions(self) -> list[tuple[float, dict[str, Any]]]:
        """One block stands for all of equal cost: equally many layers, shared parameters trained alike."""
        others, alike = super().decisions(), dict[tuple[int, bool, int], tuple[float, int]]()
        for block in self.blocks.held:
            key = self.model.core_layers[block], self.blocks.trains_shared(block), self.layers_before(block)
            share, first = alike.get(key, (0.0, block))
            alike[key] = share + self.shares[block].item(), first
        return [(share * weight, made | {"block": block}) for share, block in alike.values() for weight, made in others]

    def activate_block(self, random: StepRandom) -> int:
        """`sample_block`, which also sets whether the shared parameters are trained with that block."""
        block = self.sample_block(random)
        self._train_shared(self.blocks.trains_shared(block))
        return block

    @property
    def reading_layers(self) -> float:
        """Mean number of core layers per network evaluation in training."""
        return self.over_blocks(self.model.core_layers)

    def over_blocks(self, layers: Sequence[float]) -> float:
        """The mean of a number for each block of the core over the blocks that steps train."""
        return sum(share * each for share, each in zip(self.shares.tolist(), layers, strict=True))

    def layers_before(self, block: int) -> int:
        """Layer forwards, without gradient, of the other blocks before a step of this block that needs them."""
        return 0

    @property
    def coda_layers(self) -> int:
        """Layer forwards of the coda in a training step."""
        return self.model.num_coda_layers

    def layer_forwards(self) -> float:
        """As without blocks, but a frozen prelude has no backward pass, and a frozen coda only that to its input."""
        c, total = self.model, super().layer_forwards()
        frozen = sum(share for block, share in enumerate(self.shares.tolist()) if not self.blocks.trains_shared(block))
        return total - frozen * (2 * c.num_prelude_layers + self.coda_layers)
