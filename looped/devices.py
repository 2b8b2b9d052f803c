"""Devices and number formats that a trained model is run with: found by name, entered for the time of the work."""

import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from looped.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("cpu", "cuda", "mps")


def devices_here() -> list[str]:
    """The devices of this machine, the best one first: cuda, then mps, then the processor."""
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [*found, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def find_device(name: str) -> torch.device:
    """The device of a name: `auto` (the best there is), `cpu`, `cuda`, `cuda:1`, `mps`. Raises `UserError` where it is
    not there."""
    here = devices_here()
    kind = re.fullmatch(r"([a-z]+)(:\d+)?", name)
    if name == "auto":
        return torch.device(here[0])
    if kind is None or kind[1] not in KINDS:
        raise UserError(f"--device {name} is unknown; write auto, cpu, cuda, cuda:1 or mps")
    full = {"cuda": "cuda:0", "cpu:0": "cpu", "mps:0": "mps"}.get(name, name)
    if full not in here:
        raise UserError(f"--device {name} is not on this machine, which has {', '.join(here)}; take one of these, or "
                        f"auto")
    return torch.device(full)


def now(device: torch.device) -> float:
    """The wall clock in seconds, once the device has done what it was asked: a GPU answers before it has."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize(*([device] if device.type == "cuda" else []))
    return time.perf_counter()


@dataclass(frozen=True)
class Placement:
    """A device and a number format. In fp32 figures compare with those of every other machine; in bf16 and fp16, which
    run under autocast as training does, weights and losses stay in float32 and products are rounded."""

    device: torch.device
    dtype: str = "fp32"

    @staticmethod
    def of(device: str, dtype: str) -> "Placement":
        """By the names of both. Raises `UserError`."""
        if dtype not in DTYPES:
            raise UserError(f"--dtype {dtype} is unknown; write {', '.join(DTYPES)}")
        return Placement(find_device(device), dtype)

    @property
    def fields(self) -> dict[str, str]:
        """For rows of figures."""
        return {"device": str(self.device), "dtype": self.dtype}

    @property
    def name(self) -> str:
        """In words: `cuda:0 (NVIDIA H200), bf16`."""
        model = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        return f"{self.device}{model}, {self.dtype}"

    @contextmanager
    def at_work(self, threads: int | None = None) -> Iterator[None]:
        """Work is done in this number format, with so many CPU threads (None: as many as before); afterwards the
        process is as it was."""
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
    """So many CPU threads for the time of the work; None leaves them alone."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine(threads: int) -> dict[str, Any]:
    """The machine that figures are measured on."""
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
