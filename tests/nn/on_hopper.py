"""The attention kernels of a Hopper GPU, asked on any machine: the tensors are fake, the dispatchers are real.

Run as a program, since xformers decides much at its import, which must find the pretended torch:

    python on_hopper.py loaded      # a row of JSON per mask, dtype, head dim and pass
    python on_hopper.py unloaded    # the same where xformers' library does not load
"""

import importlib.util
import itertools
import json
import sys
import warnings

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

HEAD_DIMS = (20, 30, 32, 60, 64, 96, 128, 192, 256, 320, 512)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pretend(loaded):
    """A torch for CUDA 12.8 on a device of capability 9.0 with triton, and an xformers whose library is loaded or not;
    to be called before xformers is imported."""
    torch.version.cuda = "12.8"
    torch.cuda.get_device_capability = lambda *_, **__: (9, 0)
    torch.backends.cuda.is_flash_attention_available = lambda: True
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: name if name == "triton" else find_spec(name, *rest)
    from looped.nn.backends import xformers_ops

    xformers_ops().common._built_with_cuda = loaded


class Query:
    """The properties of a query on CUDA that the choice of a backend reads; in training it carries gradient."""

    def __init__(self, dtype, head_dim, trains):
        self.device, self.dtype, self.shape = torch.device("cuda"), dtype, (2, 6, 4, head_dim)
        self.requires_grad = trains


def masks():
    """A mask of each class that has a row in the table."""
    from looped.nn.masks import Causal, CleanNoisy, CleanNoisyBlocks, Full, Near, Packed, Padded, SlidingWindow

    places = torch.arange(6).view(1, 6, 1)
    return [Full(), Causal(), Packed(((2, 4), (6,))), Padded([3, 6]), CleanNoisy(3), CleanNoisyBlocks(3, block=1),
            SlidingWindow(2), Near(places, 1)]


def rows(masks):
    """One dict per case: mask, dtype, head_dim, trains, backend, operators (xformers' names), context (the kernel that
    the context part of CleanNoisy runs, "formula" if none takes it)."""
    from looped.nn.attention import resolve_backend
    from looped.nn.backends import xformers_operators
    from looped.nn.causal_kernels import causal_kernel

    for mask, (name, dtype), head_dim, trains in itertools.product(masks, DTYPES.items(), HEAD_DIMS, (True, False)):
        query = Query(dtype, head_dim, trains)
        backend = resolve_backend("auto", mask, query)
        operators = xformers_operators(type(mask), query.device, dtype, head_dim, trains)[0]
        kernel = causal_kernel(backend, query.device, dtype, head_dim)
        yield {"mask": type(mask).__name__, "dtype": name, "head_dim": head_dim, "trains": trains, "backend": backend,
               "operators": operators if backend == "xformers" else (),
               "context": kernel.forward.__name__.split("_")[1] if kernel else "formula"}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    pretend(sys.argv[1] == "loaded")
    real = masks()
    with FakeTensorMode():
        print(json.dumps(list(rows(real))))
