"""Size of a micro-batch (gradient accumulation), and the training timer."""

import time
from collections.abc import Callable

import torch

from looped.config import Config
from looped.errors import UserError


def micro_batch_size(config: Config, num_processes: int) -> int:
    """Sequences per micro-batch and process."""
    training = config.training
    parts = training.accumulation * num_processes
    if training.batch_size % parts:
        raise UserError(f"training.batch_size {training.batch_size} does not split into {num_processes} processes with "
                        f"training.accumulation {training.accumulation} micro-batches each; try "
                        f"{max(1, training.batch_size // parts) * parts}")
    return training.batch_size // parts


def clock_of(config: Config, device: torch.device) -> Callable[[], float]:
    """The clock of `training.clock`, in seconds. Raises UserError for CPU time of training on another device."""
    if config.training.clock == "wall":
        return time.perf_counter
    if device.type != "cpu":
        raise UserError(f"training.clock processor does not measure work on {device}; set training.clock to wall")
    return time.process_time
