"""Frequency buffers (rotary, noise level), computed from settings: not in checkpoints, always float32."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Frequencies(nn.Module):
    """A module with a buffer of frequencies. A cast to bfloat16 would round them and give far positions wrong angles,
    so they are computed again after it."""

    frequencies: Tensor

    def __init__(self, num: int):
        super().__init__()
        self.register_buffer("frequencies", torch.empty(num), persistent=False)

    def computed(self) -> Tensor:
        """The frequencies, on the CPU."""
        raise NotImplementedError

    def reset_frequencies(self) -> None:
        """Fill the buffer on its device; transformers builds models without memory and leaves it uninitialised."""
        self.frequencies = self.computed().float().to(self.frequencies.device)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self.frequencies.element_size() < 4:
            self.reset_frequencies()
        return self
