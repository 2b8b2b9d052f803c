"""The widest floating point that a device has.

Noise levels, times and their schedules are float64 on the CPU and meet a device as float32. What has to be worked out
on a device, such as a cumulative sum over a vocabulary, takes float64 where there is one: Apple's has none.
"""

import torch

WITHOUT_FLOAT64 = {"mps"}
"""Types of devices that refuse float64."""


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no more."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64
