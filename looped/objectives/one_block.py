"""Training one of several blocks of the core at a time: whose turn it is, what learns with it, and what that costs
(DiffusionBlocks, arXiv 2506.14202, section 3)."""

from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from looped.config.blocks import BlocksConfig
from looped.objectives.base import Objective
from looped.rng import StepRandom


class OneBlock(Objective):
    """Mixed into a rule whose every reading goes through one block; the rule calls `take_turns` when it is made."""

    def take_turns(self, blocks: BlocksConfig, shares: Float64[Tensor, "blocks"]) -> None:
        """shares: how often each block is trained."""
        self.blocks = blocks
        self.shares = shares
        self._learning = [parameter for parameter in self.shared_parameters() if parameter.requires_grad]
        self._let_shared_learn(any(map(blocks.trains_shared, blocks.held)))

    def shared_parameters(self) -> list[nn.Parameter]:
        """What is no block's own."""
        own = {id(parameter) for parameter in self.model.recurrence.core.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]

    def own_parameters(self, block: int) -> list[nn.Parameter]:
        return list(self.model.recurrence.core.blocks[block].parameters())

    def names_of(self, block: int) -> set[str]:
        """The names of a block's own parameters."""
        own = {id(parameter) for parameter in self.own_parameters(block)}
        return {name for name, parameter in self.named_parameters() if id(parameter) in own}

    def _let_shared_learn(self, learn: bool) -> None:
        for parameter in self._learning:
            parameter.requires_grad_(learn)

    def draw(self, random: StepRandom) -> int:
        """The block that an optimiser step trains: one for all its rows, micro-batches and processes."""
        if self.blocks.alone is not None:
            return self.blocks.alone
        return random.decide(
            "block", lambda: int(torch.multinomial(self.shares, 1, generator=random.lockstep("block"))))

    def decisions(self) -> list[tuple[float, dict[str, Any]]]:
        """Blocks of as many layers, with which as much is trained, cost the same: one stands for all of them."""
        others, alike = super().decisions(), dict[tuple[int, bool], tuple[float, int]]()
        for block in self.blocks.held:
            key = self.model.core_layers[block], self.blocks.trains_shared(block)
            share, first = alike.get(key, (0.0, block))
            alike[key] = share + self.shares[block].item(), first
        return [(share * weight, made | {"block": block}) for share, block in alike.values() for weight, made in others]

    def turn(self, random: StepRandom) -> int:
        """The same, with what is shared ready to learn or not."""
        block = self.draw(random)
        self._let_shared_learn(self.blocks.trains_shared(block))
        return block

    @property
    def reading_layers(self) -> float:
        """Mean layers of the core that a reading of a training step runs."""
        return sum(share * layers for share, layers in zip(self.shares.tolist(), self.model.core_layers, strict=True))

    @property
    def num_codas(self) -> int:
        """The number of times that a training step runs the coda."""
        return 1

    def layer_forwards(self) -> float:
        """Nothing goes back through a frozen prelude, and through a frozen coda to its input alone."""
        c, total = self.model, super().layer_forwards()
        frozen = sum(share for block, share in enumerate(self.shares.tolist()) if not self.blocks.trains_shared(block))
        return total - frozen * (2 * c.num_prelude_layers + self.num_codas * c.num_coda_layers)
