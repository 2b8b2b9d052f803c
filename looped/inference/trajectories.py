"""Several trajectories of each problem of a batch: their random streams, and copies of the batch that run together."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from looped.config.training import EvaluationConfig
from looped.data.batch import Batch
from looped.devices import to_device
from looped.rng import StepRandom
from looped.tensor_types import Float


def trajectories(config: EvaluationConfig) -> list[str]:
    """Stream prefix of the random draws of each trajectory."""
    return [f"trajectory{number} " if number else "" for number in range(config.trajectories)]


def together(streams: Sequence[str], num_problems: int, batch_size: int) -> list[Sequence[str]]:
    """The trajectories in parts that run one after another, each of at most `batch_size` sequences in all
    (`evaluation.batch_size`), but of one trajectory at least."""
    size = max(1, batch_size // max(1, num_problems))
    return [streams[first : first + size] for first in range(0, len(streams), size)]


def own_normal(random: StepRandom, stream: str, batch: Batch, dim: int) -> Float[Tensor, "batch length dim"]:
    """Standard normal draws for each row of each sequence, independent of the padding of the batch."""
    length = batch.targets.shape[1]
    if batch.lengths is None:
        return random.normal(stream, (length, dim))
    rows = [torch.randn((real, dim), generator=gen)
            for real, gen in zip(batch.lengths.tolist(), random.per_row(stream), strict=True)]
    filled = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])
    return to_device(filled, random.device)


class Copies:
    """Copies of a batch of B problems, one for each random stream: row k B + i is problem i in trajectory k.

    batch: all copies as one batch.
    """

    def __init__(self, one: Batch, random: StepRandom, streams: Sequence[str] = ("",)):
        self.one = one
        self.random = random
        self.streams = streams
        self.batch: Batch = one if len(streams) == 1 else one.repeat(len(streams))

    def repeat(self, values: Float[Tensor, "batch length width"]) -> Float[Tensor, "copies length width"]:
        """Values of the problems, for all copies."""
        return values if len(self.streams) == 1 else values.repeat(len(self.streams), 1, 1)

    def normal(self, name: str, dim: int, rows: Iterable[int] | None = None) -> Float[Tensor, "rows length dim"]:
        """Standard normal draws (`own_normal`) of some `rows`, in ascending order; None: of all."""
        num = len(self.one)
        chosen = range(num * len(self.streams)) if rows is None else [int(row) for row in rows]
        parts = []
        for copy, stream in enumerate(self.streams):
            mine = [row % num for row in chosen if row // num == copy]
            if mine:
                some = self.one[to_device(torch.tensor(mine), self.one.targets.device)]
                parts.append(own_normal(self.random.of(mine), f"{stream}{name}", some, dim))
        return torch.cat(parts)
