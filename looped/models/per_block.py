"""A model of several blocks that share nothing: each has embeddings, prelude, coda, norm and head of its own.

It is read as one model is: `encode` gives the prelude's output of every block side by side in its last dimension, and
whoever reads a block cuts out what is that block's (`of`).
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from looped.models.language import LanguageModel
from looped.nn.cache import Cache
from looped.nn.recurrence import Absent, RecurrentDepth

Encoded = Float[Tensor, "batch length widths"]


class PerBlockModel(nn.Module):
    """`held`: the model of each block that there is, which holds that block of its core alone; `num` blocks in all."""

    def __init__(self, held: Mapping[int, LanguageModel], num: int):
        super().__init__()
        self.parts = nn.ModuleDict({str(block): held.get(block) or Absent(block) for block in range(num)})
        first = next(iter(held.values()))
        self.config, self.width, self.vocab_size = first.config, first.width, first.vocab_size
        self.core_layers, self.step_layers = first.core_layers, first.step_layers

    def part(self, block: int) -> LanguageModel:
        """The model of a block. Raises UserError for one that is not here."""
        part = self.parts[str(block)]
        return part if not isinstance(part, Absent) else part.refuse()

    @property
    def held(self) -> dict[int, LanguageModel]:
        return {int(block): part for block, part in self.parts.items() if not isinstance(part, Absent)}

    @property
    def recurrence(self) -> RecurrentDepth:
        """The loop of any of them, which says how it starts and how many blocks there are."""
        return next(iter(self.held.values())).recurrence

    def of(self, e: Encoded, block: int) -> Float[Tensor, "batch length width"]:
        """What a block's own prelude has made."""
        return e[..., block * self.width : (block + 1) * self.width]

    def encode(self, tokens: Tensor, *, cache: Cache | None = None, **rows) -> Encoded:
        """Every block's prelude; arguments as `LanguageModel.encode`."""
        return torch.cat([self.part(block).encode(tokens, cache=cache and cache.of_block(block), **rows)
                          for block in range(len(self.parts))], dim=-1)

    def make_context(self, e: Encoded, kind: str, *, cache: Cache | None = None, **rows) -> Cache | None:
        """Of each block (`Cache.of_block`), from its own prelude; arguments as `LanguageModel.make_context`."""
        if kind == "inject":
            return None
        context = cache if cache is not None else Cache()
        for block in range(len(self.parts)):
            self.part(block).make_context(self.of(e, block), kind, cache=context, block=block, **rows)
        return context

    def compile_step(self) -> None:
        """Compile one step of each."""
        for part in self.held.values():
            part.compile_step()
