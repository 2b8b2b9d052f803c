"""Frequency buffers (rotary, noise level), computed from settings: not in checkpoints, always float32."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Frequencies(nn.Module):
    """A module with a buffer of frequencies, which no checkpoint holds. They are computed again where the buffer would
    lose them: after a cast to bfloat16, which rounds them and gives far positions wrong angles, and when the module
    leaves the meta device, by `to_empty` or by `load_state_dict(..., assign=True)` (then they are on the CPU if the
    module has no weights of its own)."""

    frequencies: Tensor

    def __init__(self, num: int):
        super().__init__()
        self.register_buffer("frequencies", torch.empty(num), persistent=False)

    def computed(self) -> Tensor:
        """The frequencies, on the CPU."""
        raise NotImplementedError

    def reset_frequencies(self, device: torch.device | None = None) -> None:
        """Fill the buffer, on its own device unless another is given; transformers builds models without memory and
        leaves it uninitialised."""
        self.frequencies = self.computed().float().to(self.frequencies.device if device is None else device)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        was_meta = self.frequencies.is_meta
        super()._apply(fn, recurse)
        if self.frequencies.element_size() < 4 or (was_meta and not self.frequencies.is_meta):
            self.reset_frequencies()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, local_metadata: Mapping[str, Any],
                              *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if self.frequencies.is_meta and local_metadata.get("assign_to_params_buffers"):
            devices = (tensor.device for name, tensor in state_dict.items() if name.startswith(prefix))
            self.reset_frequencies(next(devices, torch.device("cpu")))
