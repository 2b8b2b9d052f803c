"""Functions that are compiled on the devices where that pays: one kernel in place of many, which saves the reads and
writes between them."""

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch

warned: set[str] = set()
"""Functions whose compilation failed in this process; they run uncompiled."""


@functools.cache
def is_recent_cuda(device: torch.device) -> bool:
    """True for a CUDA device with native bf16 matrix products: compute capability 8 (2020) or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def on_device(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`function` compiled on recent CUDA devices with triton, unchanged elsewhere; inside another compiled function it
    is inlined."""
    if torch.compiler.is_compiling() or not is_recent_cuda(device) or not importlib.util.find_spec("triton"):
        return function
    return _compiled(function)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled at its first call. A machine without a working compiler runs it as it is, with a warning."""
    fast, name = torch.compile(function), function.__name__

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if name in warned:
            return function(*args)
        try:
            return fast(*args)
        except Exception as error:
            from torch._dynamo.exc import TorchDynamoException

            if not isinstance(error, TorchDynamoException):
                raise
            warned.add(name)
            warnings.warn(f"{name} cannot be compiled and is slower: {str(error).splitlines()[0]}; torch's "
                          f"compiler needs triton and a C compiler, such as gcc", stacklevel=2)
            return function(*args)

    return run
