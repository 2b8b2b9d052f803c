"""Attention in half precision on the CPU, which is faster in float32 over few keys: when it is, and costs elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
SHORT = 512
"""On the CPU, most keys for which attention is faster in float32 than in half precision. Backward passes of SDPA over
64 x 4 heads of 81 rows: 41 ms in bf16, 10 ms in float32; both passes over 4 x 4 heads of 512 rows: 24 ms each; over 2 x
4 heads of 900 rows: 31 and 37 ms (torch 2.13, one thread of an AMD EPYC with AVX512-BF16)."""
_counted_elsewhere = False  # see `counts_elsewhere`


def by_kernels(run: Callable[..., Tensor], num_keys: int, *rows: Tensor) -> Tensor:
    """`run(*rows)` in the dtype of the rows, of which each query meets `num_keys` keys, computed in float32 where that
    is faster. Autograd keeps copies of the rows then."""
    first = rows[0]
    if first.device.type != "cpu" or first.dtype not in HALF or num_keys > SHORT or _counted_elsewhere:
        return run(*rows)
    with torch.autocast("cpu", enabled=False):
        return run(*(each.float() for each in rows)).to(first.dtype)


def counts_elsewhere() -> bool:
    """True while costs on another device are counted on CPU tensors without values."""
    return _counted_elsewhere


@contextmanager
def counted_for(device: torch.device) -> Iterator[None]:
    """Attention on CPU tensors without values keeps what that on `device` would keep."""
    global _counted_elsewhere
    before, _counted_elsewhere = _counted_elsewhere, device.type != "cpu"
    try:
        yield
    finally:
        _counted_elsewhere = before
