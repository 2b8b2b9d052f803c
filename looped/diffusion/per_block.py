"""A denoiser of several blocks that share nothing but the clean vectors, in whose space they meet."""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from looped.config.denoise import DenoiseConfig
from looped.diffusion.denoiser import Denoiser
from looped.diffusion.edm import EDM


class PerBlockDenoiser(Denoiser):
    """A `Denoiser` of each block's own model; all start from the same weights and have the first table of targets for
    good: z, which one block hands to the next, has to mean the same to all of them."""

    def __init__(self, model: nn.Module, config: DenoiseConfig, *, edges: Float64[Tensor, "edges"] | None):
        nn.Module.__init__(self)
        self.model, self.config, self.edges = model, config, edges
        parts = {}
        for block, part in model.held.items():
            with torch.random.fork_rng(devices=[]):  # each from the same draws, whichever of them there are
                parts[str(block)] = Denoiser(part, config, edges=edges)
        self.targets = next(iter(parts.values())).targets.requires_grad_(False)
        self.edm = EDM(self.targets.sigma_data)
        for part in parts.values():
            part.targets = self.targets
        self.parts = nn.ModuleDict(parts)

    def part(self, block: int) -> Denoiser:
        """The denoiser of a block. Raises UserError for one that is not here."""
        self.model.part(block)
        return self.parts[str(block)]

    def table(self) -> Float[Tensor, "vocab dim"]:
        return self.targets.table()

    def target(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length dim"]:
        return self.targets(tokens)

    def without(self, e: Tensor, dropped: Tensor | None = None) -> Tensor:
        """As `Denoiser.without`, for every block's part of `e`."""
        return torch.cat([self.part(block).without(self.model.of(e, block), dropped)
                          for block in range(len(self.model.parts))], dim=-1)

    def read(self, z: Tensor, sigma: Tensor, e: Tensor, *, block: int | None = None,
             **options) -> tuple[Tensor, Tensor | None]:
        """As `Denoiser.read`, by the block's own denoiser; `e`: of all blocks, as `PerBlockModel.encode` gives it."""
        if block is None:
            return self._read_by_owners(z, sigma, e, **{"cache": None, **options})
        return self.part(block).read(z, sigma, self.model.of(e, block), block=block, **options)
