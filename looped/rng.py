"""Randomness as a function of (seed, step, stream, row): nothing to save, the same on any number of processes.

A row is a sequence's index in the whole optimiser step, so splitting a batch over micro-batches or processes changes
no draw. Draws are made on the CPU, so they do not depend on the device. Normal draws are moved to the device, or made
there by a generator that gives the same on every device (`DeviceRandom`). Uniform draws stay on the CPU in float64,
which some devices lack; levels, times and choices are computed from them there.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TypeVar

import torch
from torch import Tensor

from looped import philox
from looped.devices import to_device

T = TypeVar("T")


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the hash of a key such as (seed, step, "depth")."""
    return torch.Generator().manual_seed(number_of(*key))


def number_of(*key: int | str) -> int:
    """The hash of a key as a 63-bit number, for instance a row number from the row's tokens."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded_init(seed: int, stream: str) -> Iterator[None]:
    """Weights initialised inside are a function of (seed, stream); torch's global state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.set_state(generator(seed, stream).get_state())
        yield


class StepRandom:
    """Random draws of one micro-batch: rows `start ... start + count - 1` of the `total` in an optimiser step. `rows`:
    explicit row numbers (`number_of`), for rows that are not part of a step."""

    AHEAD: frozenset[str] = frozenset({"normal", "uniform", "stratified"})
    """Kinds of draws that are made on the host, where they can be made ahead of their step."""

    def __init__(self, seed: int, step: int, *, start: int = 0, count: int, total: int | None = None,
                 device: torch.device | str = "cpu", rows: Sequence[int] | None = None):
        self.seed = seed
        self.step = step
        self.start = start
        self.count = count
        self.rows: Sequence[int] = range(start, start + count) if rows is None else rows
        self.total: int = total if total is not None else start + count
        self.device: torch.device = torch.device(device)

    def on_host(self) -> "StepRandom":
        """The randomness of the same rows, with draws that stay on the host."""
        return type(self)(self.seed, self.step, start=self.start, count=self.count, total=self.total, rows=self.rows)

    def of(self, places: Sequence[int]) -> "StepRandom":
        """The randomness of some of the rows, by their places among them, for draws per row."""
        part = copy(self)
        part.rows = [self.rows[place] for place in places]
        part.count = len(part.rows)
        return part

    def lockstep(self, stream: str) -> torch.Generator:
        """A generator that is the same for all rows, micro-batches and processes of the step."""
        return generator(self.seed, self.step, stream)

    def decide(self, name: str, draw: Callable[["StepRandom"], T]) -> T:
        """Draw a decision that the cost of the whole step depends on: a depth, a block, whether to do something at
        all. `draw` takes the randomness of the step and nothing else that changes between steps, since a decision is
        also drawn ahead of its step; code that counts costs gives decisions instead (`Objective.decisions`)."""
        return draw(self)

    def per_row(self, stream: str) -> list[torch.Generator]:
        """One generator per row."""
        return [generator(self.seed, self.step, stream, row) for row in self.rows]

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal draws, float32, shape (count, *shape)."""
        return to_device(self.drawn(stream, shape), self.device)

    def drawn(self, stream: str, shape: Sequence[int]) -> Tensor:
        """`normal` on the CPU, where several draws become one copy to the device."""
        return torch.stack([torch.randn(tuple(shape), generator=gen) for gen in self.per_row(stream)])

    def uniform(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Uniform draws in [0, 1), float64 on the CPU, shape (count, *shape)."""
        return torch.stack([torch.rand(tuple(shape), generator=gen, dtype=torch.float64)
                            for gen in self.per_row(stream)])

    def stratified(self, stream: str) -> Tensor:
        """Uniform draws in (0, 1), float64 on the CPU, (count,): one in each of `total` equal strata of the step, in
        random order."""
        gen = self.lockstep(stream)
        strata = torch.randperm(self.total, generator=gen).double()
        uniform = (strata + torch.rand(self.total, generator=gen, dtype=torch.float64)) / self.total
        return uniform[self.start : self.start + self.count].clamp(1e-12, 1 - 1e-12)


class DeviceRandom(StepRandom):
    """Randomness whose normal draws are made on the device itself, by Philox: other numbers than those of `StepRandom`,
    the same on every device but for rounding, and no time of the host's."""

    AHEAD = frozenset({"uniform", "stratified"})

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        return philox.normal(number_of(self.seed, self.step, stream), self.rows, shape, self.device)

    def drawn(self, stream: str, shape: Sequence[int]) -> Tensor:
        return self.on_host().normal(stream, shape)


RNG: dict[str, type[StepRandom]] = {"host": StepRandom, "device": DeviceRandom}
"""Randomness by `training.rng`."""


class ByPlace(StepRandom):
    """Draws by position, for texts that start at position 0: the same for all rows, different for each position. The
    noise of a token depends neither on its batch nor on how many tokens are evaluated at once
    (`Padding.normal_by_place`)."""

    def __init__(self, seed: int, count: int, device: torch.device | str = "cpu"):
        super().__init__(seed, 0, count=count, device=device, rows=[0] * count)

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal draws, float32, shape (count, *shape); the first axis of `shape` is the position."""
        return to_device(self._of_places(stream, shape), self.device).expand(self.count, *shape)

    def drawn(self, stream: str, shape: Sequence[int]) -> Tensor:
        return self._of_places(stream, shape).expand(self.count, *shape)

    def _of_places(self, stream: str, shape: Sequence[int]) -> Tensor:
        return torch.cat([StepRandom(self.seed, place, count=1).drawn(stream, shape[1:]) for place in range(shape[0])])
