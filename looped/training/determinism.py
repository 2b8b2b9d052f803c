"""`training.deterministic`: training whose results are the same bits each time, on a CUDA device too.

On a CPU with a fixed number of threads they are so anyhow. CUDA kernels that add with atomics, such as FlashAttention's
backward pass, add in another order each time. torch then takes deterministic kernels where there are some and raises
where there are none: its SDPA runs FlashAttention's deterministic backward and never cuDNN's, and xformers leaves
FlashAttention for CUTLASS. The same bits need the same device, software and number of processes, too.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from looped.errors import UserError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
"""The variable that cuBLAS reads when it starts."""
CUBLAS_VALUES = (":4096:8", ":16:8")
"""Its values under which cuBLAS is deterministic (docs.nvidia.com/cuda/cublas, section on reproducibility)."""

WITHOUT = re.compile(r"(\w+) does not have a deterministic implementation")


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """If on, run the block on deterministic kernels alone, then restore the process; enter it before CUDA starts.

    Raises UserError for an operation that has no such kernel, and if cuBLAS may have started without its variable. That
    stays set, since cuBLAS has read it by then.
    """
    if not on:
        yield
        return
    _prepare_cublas()
    cudnn = torch.backends.cudnn
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    flags = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if found := WITHOUT.search(str(error)):
            raise UserError(f"training.deterministic is on, and {found[1]} has no deterministic implementation on this "
                            f"device; turn off what uses it, or set training.deterministic to false in a new --run"
                            ) from error
        raise
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = flags


@contextmanager
def only_warned() -> Iterator[None]:
    """Inside `deterministic`: let the block, which decides no weight, use other kernels too, with torch's warning."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    if before[0]:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        if before[0]:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _prepare_cublas() -> None:
    if not torch.cuda.is_available():
        return
    value = os.environ.get(CUBLAS)
    if value is None and not torch.cuda.is_initialized():
        os.environ[CUBLAS] = value = CUBLAS_VALUES[0]
    if value not in CUBLAS_VALUES:
        what = f"is {value!r}" if value else "was not set when CUDA started"
        raise UserError(f"training.deterministic needs the environment variable {CUBLAS}, which {what}; set it to "
                        f"{CUBLAS_VALUES[0]} before Python starts")
