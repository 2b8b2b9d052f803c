"""States that a rule carries from one optimiser step to the next, with the sequences that they belong to.

A row of the batch keeps its sequence until it leaves; then the row takes the sequence that the data give it at that
step, as in the public code of TRM. What the data give a row that is still at work is not trained on.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from looped.data.batch import Batch
from looped.errors import UserError
from looped.tensor_types import Bool, Int

LEFT, AGE, STATE, OF_BATCH = "left", "age", "state", "batch."
"""Names of the tensors of `CarriedStates.tensors`; those of a `Batch` follow `OF_BATCH`."""


@dataclass(frozen=True)
class Visit:
    """A micro-batch with what was carried for it. batch: its sequences, carried or new. new: mask of the new ones.
    age: segments that each has been through. state: that of each before this step; None if all are new."""

    batch: Batch
    new: Bool[Tensor, "batch"]
    age: Int[Tensor, "batch"]
    state: Tensor | None

    def state_from(self, start: Tensor) -> Tensor:
        """The carried states, or `start` for new sequences."""
        return start if self.state is None else torch.where(_like(self.new, start), start, self.state.to(start.dtype))


class CarriedStates:
    """The carried states of all rows of an optimiser step; they change with `settle` alone, once all its micro-batches
    have run."""

    def __init__(self):
        self.held: dict[str, Tensor] = {}
        self.pending: dict[int, dict[str, Tensor]] = {}

    def visit(self, given: Batch, first: int) -> Visit:
        """The rows `first`, first + 1, ... of a step; where the sequence of a row has left, it takes that of `given`.
        Raises UserError if sequences differ in length."""
        if not self.held:
            num, device = len(given), given.inputs.device
            return Visit(given, torch.ones(num, dtype=torch.bool, device=device),
                         torch.zeros(num, dtype=torch.long, device=device), None)
        own = {name: tensor[first : first + len(given)].to(given.inputs.device) for name, tensor in self.held.items()}
        offered, carried = _tensors_of(given), {name: own[name] for name in own if name.startswith(OF_BATCH)}
        _check_alike(offered, carried)
        joined = {name.removeprefix(OF_BATCH): torch.where(_like(own[LEFT], old), offered[name], old)
                  for name, old in carried.items()}
        return Visit(replace(given, **joined), own[LEFT], torch.where(own[LEFT], 0, own[AGE]), own[STATE])

    def keep(self, first: int, visit: Visit, state: Tensor, left: Bool[Tensor, "batch"]) -> None:
        """Keep the states after a step of the rows from `first` on, one segment older; `left`: those that end here."""
        self.pending[first] = _tensors_of(visit.batch) | {STATE: state.detach(), AGE: visit.age + 1, LEFT: left}

    def settle(self) -> None:
        """Carry what was kept since the last call to the next step."""
        parts = [self.pending[first] for first in sorted(self.pending)]
        if parts:
            self.held = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.pending = {}

    def tensors(self) -> dict[str, Tensor]:
        """All that is carried, by name, each with one entry per row of a step; empty before the first step."""
        return self.held

    def take_up(self, tensors: dict[str, Tensor]) -> None:
        """Carry on with earlier `tensors`."""
        self.held, self.pending = dict(tensors), {}


def _tensors_of(batch: Batch) -> dict[str, Tensor]:
    return {f"{OF_BATCH}{name}": value for name, value in vars(batch).items() if isinstance(value, Tensor)}


def _like(mask: Tensor, tensor: Tensor) -> Tensor:
    """A mask (B,) with as many axes as a tensor (B, ...)."""
    return mask.view(-1, *[1] * (tensor.ndim - 1))


def _check_alike(given: dict[str, Tensor], carried: dict[str, Tensor]) -> None:
    old, new = ({name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()} for tensors in (carried, given))
    if old != new:
        name = next(name for name in (old | new) if old.get(name) != new.get(name))
        raise UserError(f"supervision.update segment keeps sequences from step to step, so all must be of one length, "
                        f"and {name.removeprefix(OF_BATCH)} changed its shape from {old.get(name)} to {new.get(name)}; "
                        f"train on one difficulty (task.difficulty), or set it to batch")
