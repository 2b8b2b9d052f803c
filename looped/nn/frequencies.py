"""Frequencies that follow from a module's settings: in no checkpoint, and in float32 whatever its weights are in."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Frequencies(nn.Module):
    """A module with a buffer of frequencies. A model that is moved to bfloat16 would round them, and so turn far
    positions by other angles; then they are worked out anew."""

    frequencies: Tensor

    def __init__(self, num: int):
        super().__init__()
        self.register_buffer("frequencies", torch.empty(num), persistent=False)

    def computed(self) -> Tensor:
        """The frequencies, on the CPU."""
        raise NotImplementedError

    def reset_frequencies(self) -> None:
        """Fill the buffer, where it is; transformers makes models without memory and leaves it unfilled."""
        self.frequencies = self.computed().float().to(self.frequencies.device)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self.frequencies.element_size() < 4:
            self.reset_frequencies()
        return self
