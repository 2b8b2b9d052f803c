"""Losses of a loop's steps as one (`recurrence.loss_on`): of its last, of each alike, or of each by the exit gate.

    last, every   mean over the steps that are read
    gate          sum_i p_i loss_i - beta H(p), of every token, p its chances to leave after pass i (nn/exit_gate.py)

The third is the objective of Ouro's first stage (arXiv 2510.25741): without the entropy H all chance would go to
whichever pass is best early in training, as a rule the last.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from looped.config.recurrence import RecurrenceConfig
from looped.data.batch import Batch
from looped.nn.exit_gate import gate_of, log_chances


class Alike:
    """The mean loss of the states that are taken."""

    asks_gate: ClassVar[bool] = False

    def __init__(self, model: nn.Module, batch: Batch, config: RecurrenceConfig):
        self.model = model
        self.batch = batch
        self.config = config
        self.losses: list[Tensor] = []

    def take(self, state: Float[Tensor, "batch length width"], losses: Float[Tensor, "batch length"]) -> None:
        """A state, and the losses of the tokens that are read from it."""
        self.losses.append(self.batch.mean(losses))

    def loss(self) -> Float[Tensor, ""]:
        return torch.stack(self.losses).mean()


class ByGate(Alike):
    """The loss expected where the gate leaves, less beta times the entropy of its choice."""

    asks_gate = True

    def __init__(self, model: nn.Module, batch: Batch, config: RecurrenceConfig):
        super().__init__(model, batch, config)
        self.odds: list[Tensor] = []

    def take(self, state: Float[Tensor, "batch length width"], losses: Float[Tensor, "batch length"]) -> None:
        self.losses.append(losses)
        self.odds.append(gate_of(self.model)(state))

    def loss(self) -> Float[Tensor, ""]:
        log_p = log_chances(torch.stack(self.odds))
        terms = log_p.exp() * (torch.stack(self.losses) + self.config.gate_entropy * log_p)
        return self.batch.mean(terms.sum(0)).mean()


READINGS: dict[str, type[Alike]] = {"last": Alike, "every": Alike, "gate": ByGate}
