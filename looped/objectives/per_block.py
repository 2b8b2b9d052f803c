"""Block-wise denoising of blocks that share nothing: each learns with a prelude, a coda and a head of its own."""

from typing import Any

from torch import Tensor, nn

from looped.config.blocks import BlocksConfig
from looped.config.denoise import DenoiseConfig
from looped.diffusion.noise import block_shares, edges_of, noise_from_config
from looped.diffusion.per_block import PerBlockDenoiser
from looped.errors import UserError
from looped.models.per_block import PerBlockModel
from looped.objectives.base import Loss, Objective
from looped.objectives.blockwise import Blockwise
from looped.objectives.denoise import Denoise
from looped.rng import StepRandom


class PerBlock(Blockwise):
    """`Blockwise`, where the loss of a block is that of its own model; the table of targets stays as it is."""

    def __init__(self, model: PerBlockModel, config: DenoiseConfig, blocks: BlocksConfig):
        Objective.__init__(self)
        self.config, self.noise = config, noise_from_config(config.noise)
        self.denoiser = PerBlockDenoiser(model, config, edges=edges_of(blocks, self.noise))
        self.take_turns(blocks, block_shares(blocks, self.noise))
        self._rules = {int(block): Denoise.around(part, self.noise) for block, part in self.denoiser.parts.items()}

    @property
    def model(self) -> PerBlockModel:
        return self.denoiser.model

    @property
    def num_preludes(self) -> int:
        """A prelude of each block."""
        return len(self.model.core_layers)

    def shared_parameters(self) -> list[nn.Parameter]:
        return list(self.denoiser.targets.parameters())

    def own_parameters(self, block: int) -> list[nn.Parameter]:
        shared = {id(parameter) for parameter in self.shared_parameters()}
        return [parameter for parameter in self.denoiser.part(block).parameters() if id(parameter) not in shared]

    def _let_shared_learn(self, learn: bool) -> None:
        """What is common to blocks is fixed; what a block has beside its core always learns with it."""

    def loss_at(self, tokens: Any, sigma: Tensor, random: StepRandom, block: int | None = None) -> Loss:
        if block is None:
            raise UserError(f"of the {len(self.denoiser.edges) - 1} blocks one learns at a time; name it with block=")
        return self._rules[block].train(self.training).loss_at(self.ask(tokens), sigma, random, block=block)
