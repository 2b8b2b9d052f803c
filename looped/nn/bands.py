"""Attention on the CPU in parts, for masks whose rows attend to keys near them: on a grid, in windows, in short packed
documents.

SDPA computes every pair of a mask tensor. If the keys of each few rows lie in a narrow band, these rows over their band
alone are a small part of the pairs, with the same result.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from looped.nn.wide_attention import by_kernels, counts_elsewhere
from looped.tensor_types import Bool

ROWS = 64
"""Queries of a part. Forward and backward passes over 16 sequences of a grid of 30 x 30 and a window of 2 take 0.28 s
whole, 0.12 s in parts of 30, 0.08 s of 60 to 120, 0.11 s of 128 (4 heads of 16, float32, one thread)."""
LARGEST = 0.5
"""Fraction of all pairs up to which parts are faster: 0.31 of 21 x 21 cells take half of the time, 0.57 of 13 x 13 the
same time as the whole."""


class Part(NamedTuple):
    """Queries `first` to `last` over keys `low` to `high` (the ends excluded), which hold all that they attend to."""

    first: int
    last: int
    low: int
    high: int


def parts_of(allowed: Bool[Tensor, "batch 1 queries keys"]) -> list[Part]:
    """The parts of a mask on the CPU; none if they would not be faster than the whole, and none inside `torch.compile`,
    where the values of a mask are not at hand, or while costs on another device are counted."""
    num_queries, num_keys = allowed.shape[-2:]
    here = allowed.device.type == "cpu" and not counts_elsewhere()
    if num_queries <= 2 * ROWS or not here or torch.compiler.is_compiling():
        return []
    of_some, parts = allowed.flatten(0, 1).any(0), []
    for first in range(0, num_queries, ROWS):
        keys = of_some[first:first + ROWS].any(0).nonzero()
        low, high = (int(keys[0]), int(keys[-1]) + 1) if len(keys) else (0, 1)
        parts.append(Part(first, min(first + ROWS, num_queries), low, high))
    pairs = sum((last - first) * (high - low) for first, last, low, high in parts)
    return parts if pairs <= LARGEST * num_queries * num_keys else []


def run_parts(q: Tensor, k: Tensor, v: Tensor, allowed: Bool[Tensor, "batch 1 queries keys"], parts: Sequence[Part],
              ) -> Tensor:
    """SDPA of each part, in the layout (batch, heads, length, head dim). Each row must have an allowed key there."""
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([F.scaled_dot_product_attention(
            q[:, :, first:last], k[:, :, low:high], v[:, :, low:high],
            attn_mask=allowed[:, :, first:last, low:high], enable_gqa=q.shape[1] != k.shape[1])
            for first, last, low, high in parts], dim=2)

    return by_kernels(run, max(part.high - part.low for part in parts), q, k, v)
