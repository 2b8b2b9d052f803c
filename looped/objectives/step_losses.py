"""Combines the losses of loop steps (`recurrence.loss_on`): the last, their mean, or an expectation by the exit gate.

    last, every   mean over the steps that are decoded
    gate          sum_i p_i loss_i - beta H(p) per token, p_i the probability of exit after pass i (nn/exit_gate.py)

`gate` is the objective of Ouro's first stage (arXiv 2510.25741): without the entropy H all probability would go to the
pass that is best early in training, usually the last.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from looped.config.recurrence import RecurrenceConfig
from looped.data.batch import Batch
from looped.nn.exit_gate import gate_of, log_chances
from looped.tensor_types import Float


class Alike:
    """The mean loss of the states that are taken."""

    asks_gate: ClassVar[bool] = False

    def __init__(self, model: nn.Module, batch: Batch, config: RecurrenceConfig):
        self.model = model
        self.batch = batch
        self.config = config
        self.losses: list[Tensor] = []

    def take(self, state: Float[Tensor, "batch length states"], losses: Float[Tensor, "batch length"]) -> None:
        """Record a state and the losses of the tokens decoded from it."""
        self.losses.append(self.batch.mean(losses))

    def loss(self) -> Float[Tensor, ""]:
        return torch.stack(self.losses).mean()


class ByGate(Alike):
    """The expected loss under the gate's exit distribution, minus beta times its entropy."""

    asks_gate = True

    def __init__(self, model: nn.Module, batch: Batch, config: RecurrenceConfig):
        super().__init__(model, batch, config)
        self.odds: list[Tensor] = []

    def take(self, state: Float[Tensor, "batch length states"], losses: Float[Tensor, "batch length"]) -> None:
        self.losses.append(losses)
        self.odds.append(gate_of(self.model)(state))

    def loss(self) -> Float[Tensor, ""]:
        log_p = log_chances(torch.stack(self.odds))
        terms = log_p.exp() * (torch.stack(self.losses) + self.config.gate_entropy * log_p)
        return self.batch.mean(terms.sum(0)).mean()


READINGS: dict[str, type[Alike]] = {"last": Alike, "every": Alike, "gate": ByGate}
