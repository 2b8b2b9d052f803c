"""Micro-batches of each process (gradient accumulation), and the training timer."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from looped.config import Config
from looped.errors import UserError


@dataclass(frozen=True)
class MicroBatches:
    """The part of an optimiser step that one process works on: micro-batches `first ... first + num - 1`, each of
    `size` sequences. total: of all processes."""

    size: int
    first: int
    num: int
    total: int

    @staticmethod
    def of(config: Config, rank: int, num_processes: int) -> "MicroBatches":
        """The part of process `rank`. A batch that does not split evenly is cut into the fewest equal micro-batches of
        which every process gets `training.accumulation` or more, the first processes one more than the others: so a job
        that has lost a node trains on. Raises UserError for more processes than sequences."""
        batch, wanted = config.training.batch_size, config.training.accumulation * num_processes
        if wanted > batch:
            raise UserError(f"training.batch_size {batch} does not split into {num_processes} processes with "
                            f"training.accumulation {config.training.accumulation} micro-batches each; try {wanted}")
        total = next(parts for parts in range(wanted, batch + 1) if batch % parts == 0)
        each, more = divmod(total, num_processes)
        return MicroBatches(batch // total, rank * each + min(rank, more), each + (rank < more), total)

    def rows(self, micro: int) -> range:
        """The rows of the optimiser step in this process's micro-batch `micro`."""
        start = (self.first + micro) * self.size
        return range(start, start + self.size)


def clock_of(config: Config, device: torch.device) -> Callable[[], float]:
    """The clock of `training.clock`, in seconds. Raises UserError for CPU time of training on another device."""
    if config.training.clock == "wall":
        return time.perf_counter
    if device.type != "cpu":
        raise UserError(f"training.clock processor does not measure work on {device}; set training.clock to wall")
    return time.process_time
