"""A device that this machine does not have: tensors on it are real, and refuse to meet those of the processor.

Inside `pretend()` the device `meta` holds its numbers in ordinary memory. What a real one would refuse raises here too:
an operation on tensors of both devices, and numbers that are read by numpy without `.cpu()`. What would cost time there
is counted: kernels, copies to the device, and reads of the device, which wait until it has done all its work.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
MOVES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
ROOT = Path(__file__).parents[1] / "looped"
SIZED_BY_VALUES = {"nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim", "equal", "is_nonzero",
                   "bincount", "repeat_interleave", "_local_scalar_dense"}
"""Operations that the host waits for: their result, or its size, depends on values."""
NO_KERNEL = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
             "split", "split_with_sizes", "chunk", "unbind", "alias", "detach", "as_strided", "diagonal", "view_as",
             "_reshape_alias", "lift_fresh", "unfold", "narrow", "empty", "empty_like", "new_empty", "empty_strided",
             "new_empty_strided", "_local_scalar_dense", "is_same_size"}
"""Operations that launch nothing: views, allocations, and the read of a number."""


@dataclass
class Counts:
    """Work of an actual device: kernels by name; reads of it, copies to it that the host does not
    wait for and those that it waits for (`waits`), by the line of looped/ that asked."""

    kernels: Counter = field(default_factory=Counter)
    reads: Counter = field(default_factory=Counter)
    copies: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)

    def see(self, name, args, kwargs, away, here):
        """Count one operation; `away`: its tensors on the device, `here`: those on the host."""
        short = name.removeprefix("aten::")
        asked = kwargs.get("device")
        if name in MOVES:
            target = args[0] if name == "aten::copy_" else None
            to_device = isinstance(target, Away) if target is not None else (
                bool(away) if asked is None else torch.device(asked).type == DEVICE.type)
            if away and not to_device:
                self.reads[short, line()] += 1
            elif to_device and (not away or (target is not None and here)):
                (self.copies if later(name, args, kwargs) else self.waits)[line()] += 1
            elif away:
                self.kernels[short] += 1
            return
        if away and short in SIZED_BY_VALUES:
            self.reads[short, line()] += 1
        if away and short.startswith(("index", "_index_put")):
            picked = args[1] if isinstance(args[1], list | tuple) else ()
            if any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in picked):
                self.reads["bool index", line()] += 1
            self.waits.update(line() for each in picked if each is not None and not isinstance(each, Away))
        made = asked is not None and torch.device(asked).type == DEVICE.type
        if (away or made) and short not in NO_KERNEL:
            self.kernels[short] += 1


def later(name, args, kwargs):
    """True for a copy that the host does not wait for."""
    return bool(kwargs.get("non_blocking", args[2] if name == "aten::copy_" and len(args) > 2 else False))


def line():
    """`file:line` of the innermost frame in looped/, else of the innermost one outside of torch."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
    frame = own[-1] if own else next(
        (frame for frame in reversed(frames) if "site-packages/torch/" not in frame.filename), frames[-1])
    return f"{frame.filename.removeprefix(str(ROOT.parent) + '/')}:{frame.lineno}"


seen = Counts()
"""The counts of the innermost `pretend()`."""


class Away(torch.Tensor):
    """A tensor that says it lies on `DEVICE`; `held` has its numbers."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), dtype=held.dtype,
                                                   storage_offset=held.storage_offset(), device=DEVICE,
                                                   requires_grad=False)

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"Away({self.held})"

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert meta device type tensor to numpy; use .cpu() first")

    __array__ = numpy

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """An operation as the device would do it."""
    tensors = list(tensors_in((args, kwargs)))
    away = [each for each in tensors if isinstance(each, Away)]
    name, asked = func._schema.name, kwargs.get("device")
    seen.see(name, args, kwargs, away, [each for each in tensors if not isinstance(each, Away)])
    here = [each for each in tensors if not isinstance(each, Away) and each.dim() > 0]  # a number may be anywhere
    if away and here and name not in MOVES and not name.startswith("aten::index"):
        raise RuntimeError(f"{name}: tensors on meta and cpu: {[tuple(each.shape) for each in here]}")
    if away and here and name.startswith("aten::index") and not isinstance(args[0], Away):
        raise RuntimeError(f"{name}: indices on meta of a tensor on cpu")
    if asked is not None and torch.device(asked).type == DEVICE.type:
        kwargs = kwargs | {"device": "cpu"}
        goes = True
    else:
        goes = bool(away) and asked is None
        if name == "aten::copy_":
            goes = isinstance(args[0], Away)
    if name == "aten::_local_scalar_dense":
        goes = False
    found = func(*mapped(unwrapped, args), **mapped(unwrapped, kwargs))
    if name.endswith("_") and tensors and found is unwrapped(args[0]):
        return args[0]
    return mapped(lambda each: Away(each) if type(each) is torch.Tensor else each, found) if goes else found


def unwrapped(each):
    return each.held if isinstance(each, Away) else each


def tensors_in(value):
    """All tensors of nested arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each)


def mapped(change, value):
    """Nested arguments with `change` done to each."""
    if isinstance(value, list | tuple):
        return type(value)(mapped(change, each) for each in value)
    return {name: mapped(change, each) for name, each in value.items()} if isinstance(value, dict) else change(value)


class Factories(TorchDispatchMode):
    """Tensors that are made on the device, or moved there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Literals(TorchFunctionMode):
    """Numbers of Python that are put on the device: no operation of a tensor that `Factories` could see."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            found = func(*args, **kwargs | {"device": None})
            return found if isinstance(found, Away) else found.to(DEVICE)
        return func(*args, **kwargs)


@contextmanager
def pretend(grad: bool = False) -> Iterator[torch.device]:
    """The device, while it is there; `seen` begins at 0. grad: gradients are computed."""
    global seen
    seen = Counts()
    enabled, autocast = torch.is_autocast_enabled, torch.autocast  # which know real devices alone
    torch.is_autocast_enabled = lambda device=None: device != DEVICE.type and enabled(device or "cpu")
    torch.autocast = lambda device, *rest, **settings: (
        nullcontext() if device == DEVICE.type else autocast(device, *rest, **settings))
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a module's own tensors cannot become others
    try:
        with Literals(), Factories(), torch.set_grad_enabled(grad):
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
        torch.is_autocast_enabled, torch.autocast = enabled, autocast
