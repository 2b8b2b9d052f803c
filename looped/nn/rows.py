"""`Rows`, the context of a model call that every layer gets: attention mask, positions, caches and active block."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from looped.devices import to_device
from looped.nn.cache import Cache, LayerCache
from looped.nn.mask_base import Mask
from looped.tensor_types import Int

Positions = Int[Tensor, "batch length axes"]
Start = int | Int[Tensor, "batch"]
"""Position of the first row, one for all sequences or one per sequence (padding on the left)."""
Rotation = tuple[Tensor, Tensor]
"""Rotary angles as (cos, sin), each (1 or B, L, 1, K / 2)."""
Rotary = Callable[[Tensor], Rotation]
"""Positions -> their rotary angles."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Attention mask and positions of the rows, and the keys and values of other rows that they attend to.

    mask: the attention pattern; None: causal, or with a context, the context rows up to a row's own place and the row
    itself. positions: with one axis or several (cells of a grid); None: `start`, start + 1, ... cache: keys and values
    of earlier rows, to which those of these rows are appended. context: clean keys and values
    (`LanguageModel.make_context`); `strict`: a row attends only to those before its own place. block: the active block
    of the core; None: the first. step: the number of loop steps before a single step, which a loop with a step
    embedding needs (`LanguageModel.step`).

    A layer gets its own part of cache and context, and `rotation`, the rotary angles of the positions. angles: gives
    these angles for (the model's rotary, the rows), where they are computed ahead for a text that grows.
    """

    mask: Mask | None = None
    positions: Positions | None = None
    start: Start = 0
    cache: Cache | LayerCache | None = None
    context: Cache | LayerCache | None = None
    strict: bool = False
    block: int | None = None
    step: int | None = None
    rotation: Rotation | None = None
    angles: Callable[[Rotary, Tensor], Rotation] | None = None

    def rotated(self, rotary: Rotary, x: Tensor) -> Rotation:
        """The rotary angles of the rows `x` (B, L, ...)."""
        if self.angles is not None:
            return self.angles(rotary, x)
        return rotary(self.consecutive(x.shape[1], x.device) if self.positions is None else self.positions)

    def consecutive(self, num: int, device: torch.device) -> Int[Tensor, "*batch length"]:
        """The positions `start`, start + 1, ... of `num` rows: (num,), or (B, num) with one start per sequence."""
        place = torch.arange(num, device=device)
        if isinstance(self.start, Tensor):
            return to_device(self.start, device).unsqueeze(-1) + place
        return self.start + place  # a number, which is no tensor to copy

    def having(self, **changes: Any) -> "Rows":
        """A copy with some fields changed."""
        return replace(self, **changes)

    def at(self, *path: Any) -> "Rows":
        """A copy with the part of cache and context at a path."""
        if self.cache is None and self.context is None:
            return self
        return replace(self, cache=self.cache and self.cache.child(*path),
                       context=self.context and self.context.child(*path))

    def in_run(self, number: int) -> "Rows":
        """A copy for one of several runs of the core in a step, with its part of the cache, and of a context that has
        one: that of clean rows, which run the core once, is the same in all."""
        if self.cache is None and self.context is None:
            return self
        return replace(self, cache=self.cache and self.cache.child("run", number),
                       context=self.context and self.context.own("run", number))

    def layer(self, index: int) -> "Rows":
        """A copy with the cache and context of one layer."""
        if self.cache is None and self.context is None:
            return self
        return replace(self, cache=None if self.cache is None else self.cache.layer(index),
                       context=None if self.context is None else self.context.layer(index))

    def of_block(self, block: int | None) -> "Rows":
        """A copy for one of several blocks of the core, with its part of cache and context."""
        return replace(self, block=block, cache=self.cache and self.cache.of_block(block),
                       context=self.context and self.context.of_block(block))

    def of(self, sequences: Tensor) -> "Rows":
        """The rows of some sequences of a batch, by index; without cache and context, which cover all sequences."""
        own = {} if self.mask is None else {"mask": self.mask.of_rows(sequences)}
        if isinstance(self.start, Tensor):
            own["start"] = self.start[to_device(sequences, self.start.device)]
        if self.positions is not None and len(self.positions) > 1:
            own["positions"] = self.positions[to_device(sequences, self.positions.device)]
        if self.rotation is not None and len(self.rotation[0]) > 1:
            own["rotation"] = tuple(part[sequences] for part in self.rotation)
        return replace(self, cache=None, context=None, angles=None, **own)


PLAIN = Rows()
"""Causal rows from position 0 on."""
