"""Precision of training: the dtype of matrix products that `training.precision` means on a device, and TF32 on CUDA.

    auto    bf16 on a CUDA device that has it, fp32 elsewhere
    native  bf16 on x86 CPUs with AVX512-BF16 or AMX as well
    fp32    float32; on CUDA, unless `training.tf32` is off, products run in TF32: their inputs rounded to 10 bits of
            mantissa, sums in float32
    bf16    autocast: weights, residuals and losses in float32, products in bf16; on the CPU attention over few keys in
            float32 (`looped.nn.wide_attention.SHORT`)

Everything that trains, times or counts a training step asks `Precision.of`.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from looped.config import Config
from looped.devices import DTYPES, devices_here, multiplies_natively, warn_of_emulation
from looped.errors import UserError

ON = ("1", "true", "yes", "on", "y", "t")


def training_device() -> torch.device:
    """The device that training takes, as accelerate chooses it: the launcher's, or the best one of this machine."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ON:
        return torch.device("cpu")
    return torch.device(os.environ.get("ACCELERATE_TORCH_DEVICE") or devices_here()[0])


@dataclass(frozen=True)
class Precision:
    """dtype: that of matrix products, `fp32` or `bf16`. tf32: products that are left in float32 run in TF32."""

    dtype: str
    tf32: bool = False

    @staticmethod
    def of(config: Config, device: torch.device | str) -> "Precision":
        """The precision in which `config` is trained on a device."""
        device, asked = torch.device(device), config.training
        tf32 = asked.tf32 and device.type == "cuda" and torch.cuda.is_tf32_supported()
        if asked.precision in DTYPES:
            return Precision(asked.precision, tf32)
        fast = multiplies_natively(device, "bf16") and (device.type == "cuda" or asked.precision == "native")
        return Precision("bf16" if fast else "fp32", tf32)

    @property
    def name(self) -> str:
        """Display name: `fp32`, `bf16`, `bf16 with TF32`."""
        return self.dtype + " with TF32" * self.tf32

    def check(self, device: torch.device) -> None:
        """Raise UserError if a CUDA device lacks bf16, which torch would emulate slowly; warn of a CPU that does."""
        warn_of_emulation(device, self.dtype, "set training.precision to native or fp32")
        if self.dtype == "bf16" and device.type == "cuda" and not multiplies_natively(device, "bf16"):
            raise UserError(f"training.precision bf16 needs a GPU of compute capability 8.0 or higher, and "
                            f"{torch.cuda.get_device_name(device)} is older; set training.precision to auto or fp32")

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast of a step that is timed or counted on the CPU."""
        return torch.autocast("cpu", torch.bfloat16) if self.dtype == "bf16" else nullcontext()

    @contextmanager
    def products(self, device: torch.device) -> Iterator[None]:
        """Run the float32 products of the block in TF32 or without on CUDA, then restore the process; elsewhere nothing
        changes. torch has two interfaces for this, and reads of the older one fail after writes of the newer."""
        if device.type != "cuda":
            yield
            return
        before = torch.backends.cuda.matmul.fp32_precision == "tf32"
        _set_tf32(self.tf32)
        try:
            yield
        finally:
            _set_tf32(before)


def _set_tf32(on: bool) -> None:
    torch.set_float32_matmul_precision("high" if on else "highest")
