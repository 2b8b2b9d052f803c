"""The widest floating-point dtype of a device.

Noise levels, times and their schedules are float64 on the CPU and reach a device as float32. Computations that need
precision on a device, such as a cumulative sum over a vocabulary, use float64 if the device has it; Apple's has not.
"""

import torch

WITHOUT_FLOAT64 = {"mps"}
"""Device types without float64."""


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 if the device has no float64."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64
