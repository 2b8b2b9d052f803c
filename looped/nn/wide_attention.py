"""Attention in half precision on the CPU, which is faster in float32 over few keys: when it is, and costs elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
SHORT = 512
"""On the CPU, most keys for which attention is faster in float32 than in half precision. Backward passes of SDPA over
64 x 4 heads of 81 rows: 41 ms in bf16, 10 ms in float32; both passes over 4 x 4 heads of 512 rows: 24 ms each; over 2 x
4 heads of 900 rows: 31 and 37 ms (torch 2.13, one thread of an AMD EPYC with AVX512-BF16)."""
_counted_elsewhere = False
"""True while costs on another device are counted on CPU tensors without values."""


def runs_wide(q: Tensor, k: Tensor) -> bool:
    """True if attention casts these to float32, of which autograd keeps copies: short rows in half precision on the
    CPU."""
    return q.device.type == "cpu" and q.dtype in HALF and k.shape[1] <= SHORT and not _counted_elsewhere


@contextmanager
def counted_for(device: torch.device) -> Iterator[None]:
    """Attention on CPU tensors without values keeps what that on `device` would keep."""
    global _counted_elsewhere
    before, _counted_elsewhere = _counted_elsewhere, device.type != "cpu"
    try:
        yield
    finally:
        _counted_elsewhere = before
