"""Device and dtype that a trained model runs with: looked up by name, applied by a context manager."""

import os
import platform
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from looped.errors import UserError

WITHOUT_FLOAT64 = {"mps"}
"""Device types without float64."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("cpu", "cuda", "mps")
NATIVE = {"fp32": ("avx",), "bf16": ("avx512_bf16", "amx_bf16"), "fp16": ("avx512_fp16", "amx_fp16")}
"""Capabilities of an x86 CPU, as torch names them, any of which multiplies a dtype natively."""
USABLE = {"fp32": NATIVE["fp32"], "bf16": (*NATIVE["bf16"], "avx512_f"), "fp16": NATIVE["fp16"]}
"""Those with which torch is not far slower than in fp32: AVX-512 alone converts bf16 quickly."""


def devices_here() -> list[str]:
    """Devices of this machine, best first: cuda, then mps, then cpu."""
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [*found, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def find_device(name: str) -> torch.device:
    """Device of a name: `auto` (the best one), `cpu`, `cuda`, `cuda:1`, `mps`. Raises `UserError` if it is missing."""
    here = devices_here()
    kind = re.fullmatch(r"([a-z]+)(:\d+)?", name)
    if name == "auto":
        return torch.device(here[0])
    if kind is None or kind[1] not in KINDS:
        raise UserError(f"--device {name} is unknown; write auto, cpu, cuda, cuda:1 or mps")
    full = {"cuda": "cuda:0", "cpu:0": "cpu", "mps:0": "mps"}.get(name, name)
    if full not in here:
        raise UserError(f"--device {name} is not on this machine, which has {', '.join(here)}; choose one of these, or "
                        f"auto")
    return torch.device(full)


def _of_cpu() -> Mapping[str, Any]:
    """Capabilities of the CPU by torch's names; of an older torch, none."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def multiplies_natively(device: torch.device, dtype: str) -> bool:
    """True for products of bf16 or fp16 on a CUDA device (bf16: from compute capability 8.0 on) and on an x86 CPU with
    instructions for them. False for a CPU of which this is not known."""
    if device.type == "cuda":
        return dtype != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False)
    found = _of_cpu() if device.type == "cpu" else {}
    return any(found.get(name) for name in NATIVE[dtype])


def warn_of_emulation(device: torch.device, dtype: str, way_out: str) -> None:
    """Warn if an x86 CPU has no instructions for products of `dtype`, which torch computes one by one there."""
    found = _of_cpu() if device.type == "cpu" else {}
    if str(found.get("architecture")).startswith("x86") and not any(found.get(name) for name in USABLE[dtype]):
        warnings.warn(f"this CPU has no instructions for {dtype}, whose products take up to a hundred times as long as "
                      f"those of fp32; {way_out}", stacklevel=3)


def widest(device: torch.device) -> torch.dtype:
    """The widest floating-point dtype of a device: float64, or float32 if it has no float64, as Apple's.

    Noise levels, times and their schedules are float64 on the host and reach a device as float32. Computations that
    need precision on a device, such as a cumulative sum over a vocabulary, use the widest dtype.
    """
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def pinned(values: Any, device: torch.device) -> Any:
    """Values in pinned host memory if the device is CUDA, so that the copy to it is asynchronous."""
    return values.pin_memory() if device.type == "cuda" else values


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` on the device. A copy from the host does not wait for the device; one from the device to the host does,
    since the host would read before it has arrived."""
    return values.to(device, non_blocking=values.device.type == "cpu")


def to_like(values: Tensor, like: Tensor) -> Tensor:
    """`values` in the dtype and on the device of another tensor, as by `to_device`."""
    return to_device(values.to(like.dtype), like.device)


def read_together(values: Sequence[float | Tensor]) -> list[float]:
    """Numbers and scalar tensors as floats, those of a device in one read, for which the host waits."""
    by_device: dict[torch.device, list[int]] = {}
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(place)
    found = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
    for device, places in by_device.items():
        wide = torch.stack([values[place].detach().reshape(()).to(widest(device)) for place in places])
        for place, number in zip(places, wide.tolist(), strict=True):
            found[place] = number
    return found


class HostCopy:
    """A copy of a tensor to the host, on its way while the host goes on; `wait` returns it once it has arrived."""

    def __init__(self, values: Tensor):
        self.device: torch.device = values.device
        later = self.device.type == "cuda"
        self._copy: Tensor = torch.empty(values.shape, dtype=values.dtype, pin_memory=True) if later else values
        self._event: torch.cuda.Event | None = None
        if later:
            self._copy.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(self.device))

    def wait(self) -> Tensor:
        """The values on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.cpu()


def now(device: torch.device) -> float:
    """Wall-clock seconds after waiting for the device, since GPU calls return before their work is done."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize(*([device] if device.type == "cuda" else []))
    return time.perf_counter()


@dataclass(frozen=True)
class Placement:
    """A device and a dtype. Results in fp32 compare across machines. bf16 and fp16 run under autocast, as in training:
    weights and losses stay in float32, matrix products are rounded."""

    device: torch.device
    dtype: str = "fp32"

    @staticmethod
    def of(device: str, dtype: str) -> "Placement":
        """Placement from the names of both. Raises `UserError`."""
        if dtype not in DTYPES:
            raise UserError(f"--dtype {dtype} is unknown; write {', '.join(DTYPES)}")
        found = Placement(find_device(device), dtype)
        warn_of_emulation(found.device, dtype, "leave out --dtype")
        return found

    @property
    def fields(self) -> dict[str, str]:
        """Device and dtype as columns of result rows."""
        return {"device": str(self.device), "dtype": self.dtype}

    @property
    def name(self) -> str:
        """Display name: `cuda:0 (NVIDIA H200), bf16`."""
        model = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        return f"{self.device}{model}, {self.dtype}"

    @contextmanager
    def at_work(self, threads: int | None = None) -> Iterator[None]:
        """Run the block in this dtype with `threads` CPU threads (None: unchanged), then restore the process."""
        with ExitStack() as stack:
            stack.enter_context(use_threads(threads))
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))  # the one whose memory is measured
            stack.enter_context(nullcontext() if self.dtype == "fp32" else
                                torch.autocast(self.device.type, DTYPES[self.dtype]))
            yield


CPU = Placement(torch.device("cpu"))


@contextmanager
def use_threads(threads: int | None) -> Iterator[None]:
    """Use `threads` CPU threads inside the block; None leaves the number unchanged."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine(threads: int) -> dict[str, Any]:
    """The machine of a measurement: processor, CPUs, threads, torch."""
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        processor = names[0] if names else processor
    return {"processor": processor, "logical_cpus": os.cpu_count() or 1, "threads": threads,
            "torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def machine_line(where: dict[str, Any]) -> str:
    return (f"{where['processor']}, {where['threads']} of {where['logical_cpus']} CPUs, torch {where['torch']}, "
            f"{where['cpu_capability']}")
