"""Rows: mask, positions, caches and block of a call to a model, one object through every layer."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from looped.nn.cache import Cache, LayerCache
from looped.nn.mask import Mask
from looped.shapes import Int

Positions = Int[Tensor, "batch length axes"]
Start = int | Int[Tensor, "batch"]
"""The position of the first row, for all sequences or each its own (padding on the left)."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Who sees whom, where rows stand, and what else they attend to.

    mask: who sees whom; None: earlier rows and a row itself are seen, or beside a context the context's rows up to the
    own place and the own row. positions: where rows stand, with an axis or several (cells of a grid); None: at `start`,
    start + 1, ... cache: keys and values of earlier rows, to which these are added. context: clean keys and values
    (`LanguageModel.make_context`); `strict`: of these only those before the own place are seen. block: the block of
    the core that is at work; None: the first.

    A layer is told of them with its own part of cache and context, and with `rotation`, the angles of the positions.
    """

    mask: Mask | None = None
    positions: Positions | None = None
    start: Start = 0
    cache: Cache | LayerCache | None = None
    context: Cache | LayerCache | None = None
    strict: bool = False
    block: int | None = None
    rotation: tuple[Tensor, Tensor] | None = None

    def having(self, **changes: Any) -> "Rows":
        """A copy with some of it changed."""
        return replace(self, **changes)

    def at(self, *path: Any) -> "Rows":
        """With the part of cache and context that lies at a path."""
        if self.cache is None and self.context is None:
            return self
        return replace(self, cache=self.cache and self.cache.child(*path),
                       context=self.context and self.context.child(*path))

    def layer(self, index: int) -> "Rows":
        """With the part of a layer."""
        if self.cache is None and self.context is None:
            return self
        return replace(self, cache=None if self.cache is None else self.cache.layer(index),
                       context=None if self.context is None else self.context.layer(index))

    def of_block(self, block: int | None) -> "Rows":
        """By one of several blocks of the core, with its part of cache and context."""
        return replace(self, block=block, cache=self.cache and self.cache.of_block(block),
                       context=self.context and self.context.of_block(block))

    def of(self, sequences: Tensor) -> "Rows":
        """Those of some sequences of a batch, by their numbers; without cache and context, which are of all."""
        own = {} if self.mask is None else {"mask": self.mask.of_rows(sequences)}
        if isinstance(self.start, Tensor):
            own["start"] = self.start[sequences.to(self.start.device)]
        if self.positions is not None and len(self.positions) > 1:
            own["positions"] = self.positions[sequences.to(self.positions.device)]
        if self.rotation is not None and len(self.rotation[0]) > 1:
            own["rotation"] = tuple(part[sequences] for part in self.rotation)
        return replace(self, cache=None, context=None, **own)


PLAIN = Rows()
"""Causal rows from position 0 on."""
