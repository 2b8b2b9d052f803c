"""A device that this machine does not have: tensors on it are real, and refuse to meet those of the processor.

Inside `pretend()` the device `meta` holds its numbers in ordinary memory. What a real one would refuse raises here too:
an operation on tensors of both devices, and numbers that are read by numpy without `.cpu()`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
MOVES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}


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
            return func(*args, **kwargs | {"device": None}).to(DEVICE)
        return func(*args, **kwargs)


@contextmanager
def pretend() -> Iterator[torch.device]:
    """The device, while it is there."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast  # which know real devices alone
    torch.is_autocast_enabled = lambda device=None: device != DEVICE.type and enabled(device or "cpu")
    torch.autocast = lambda device, *rest, **settings: (
        nullcontext() if device == DEVICE.type else autocast(device, *rest, **settings))
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a module's own tensors cannot become others
    try:
        with Literals(), Factories(), torch.no_grad():
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
        torch.is_autocast_enabled, torch.autocast = enabled, autocast
