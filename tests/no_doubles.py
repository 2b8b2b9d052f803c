"""A device without float64, as Apple's: tensors that say they are on `meta`, with their numbers on the CPU.

Inside `no_doubles()` a tensor that is sent to the device, or made there, is a `OnDevice`. As there, float64 is refused,
and so is an operation between it and a tensor of the CPU that is no single number.
"""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from looped import devices

DEVICE = torch.device("meta")
aten = torch.ops.aten


class OnDevice(Tensor):
    """A tensor of the device; `inner` has its numbers."""

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype is torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        made = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype,
                                             storage_offset=inner.storage_offset(), device=DEVICE)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self):
        return f"OnDevice({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Sends what is made on the device there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """An operation on the numbers of its tensors; its result is on the device where they are, or where it says."""
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    there = [each for each in tensors if isinstance(each, OnDevice)]
    device = kwargs.get("device")
    goes = torch.device(device).type == DEVICE.type if device is not None else bool(there)
    copies = func in (aten._to_copy.default, aten.copy_.default)
    mixed = [each for each in tensors if not isinstance(each, OnDevice) and each.ndim]
    if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):  # may be told places by the CPU
        mixed = mixed if not isinstance(args[0], OnDevice) else []
    if there and mixed and not copies:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} has one on cpu and one on mps")
    if func is aten.copy_.default:
        goes = isinstance(args[0], OnDevice)
        if goes and args[1].dtype is torch.float64 and args[1].ndim:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    inside = tree_map_only(OnDevice, lambda each: each.inner, (args, kwargs))
    if device is not None:
        inside[1]["device"] = "cpu" if goes else device
    out = func(*inside[0], **inside[1])
    if not goes:
        return out
    out = tree_map(lambda each: OnDevice(each) if isinstance(each, Tensor) else each, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out


@contextmanager
def no_doubles():
    """A device that has no float64."""
    def of_cpu(function):
        """Of a device's name, which torch does not expect here."""
        return lambda device, *args, **kwargs: function("cpu" if device == DEVICE.type else device, *args, **kwargs)

    def sent(function):
        """Of plain numbers, which a mode does not see on their way to a device."""
        def made(data, *args, device=None, **kwargs):
            there = device is not None and torch.device(device).type == DEVICE.type
            found = function(data, *args, device=None if there else device, **kwargs)
            return found.to(device) if there else found

        return made

    changes = dict.fromkeys(("autocast", "is_autocast_enabled", "get_autocast_dtype"), of_cpu)
    changes |= dict.fromkeys(("tensor", "as_tensor"), sent)
    known = {name: getattr(torch, name) for name in changes}
    for name, change in changes.items():
        setattr(torch, name, change(known[name]))
    devices.WITHOUT_FLOAT64.add(DEVICE.type)
    try:
        with Device():
            yield DEVICE
    finally:
        devices.WITHOUT_FLOAT64.discard(DEVICE.type)
        for name, function in known.items():
            setattr(torch, name, function)
