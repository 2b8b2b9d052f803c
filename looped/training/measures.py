"""The size of a micro-batch, and the clock that training is timed by."""

import time
from collections.abc import Callable

import torch

from looped.config import Config
from looped.errors import UserError


def micro_batch_size(config: Config, num_processes: int) -> int:
    """Sequences of one micro-batch of one process."""
    training = config.training
    parts = training.accumulation * num_processes
    if training.batch_size % parts:
        raise UserError(f"training.batch_size {training.batch_size} does not split into {num_processes} processes of "
                        f"training.accumulation {training.accumulation} micro-batches; try "
                        f"{max(1, training.batch_size // parts) * parts}")
    return training.batch_size // parts


def clock_of(config: Config, device: torch.device) -> Callable[[], float]:
    """Seconds by `training.clock`. Raises UserError where a processor's time says nothing about training."""
    if config.training.clock == "wall":
        return time.perf_counter
    if device.type != "cpu":
        raise UserError(f"training.clock processor does not see what {device} does; set training.clock to wall")
    return time.process_time
