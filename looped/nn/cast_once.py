"""Weights in the dtype of matrix products, cast once per training step instead of at every use in the loop.

Autocast keeps the casts of the weights that `F.linear` takes; the products of fused.py cast theirs themselves, forward
and backward, at each of T loop steps. Inside `casts_kept` they share one cast, which takes two bytes for each weight
until the end. The bits are those of a cast at each use.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_kept: dict[tuple[int, torch.dtype], tuple[Tensor, int, Tensor]] | None = None
"""(id of a weight, dtype) -> (the weight, which so keeps its id, its version, its cast). Global, since on CUDA the
backward pass runs in a thread of its own."""


@contextmanager
def casts_kept() -> Iterator[None]:
    """Keep the casts made inside, in all threads. No weight may change inside: enter it around the forward and backward
    pass of a micro-batch."""
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, without gradient; itself if it has it. Raises RuntimeError for a weight that has changed
    since its cast was kept."""
    kept = None if torch.compiler.is_compiling() else _kept  # a graph fuses its casts
    if weight.dtype == dtype or kept is None:
        return weight.to(dtype)
    if (id(weight), dtype) not in kept:
        with torch.no_grad():
            kept[id(weight), dtype] = weight, weight._version, weight.to(dtype)
    _, version, narrow = kept[id(weight), dtype]
    if version != weight._version:
        raise RuntimeError("a weight has changed inside casts_kept, where its cast is kept; change weights outside")
    return narrow
