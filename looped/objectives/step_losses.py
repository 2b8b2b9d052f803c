"""Combines the losses of loop steps (`recurrence.loss_on`): the last, their mean, or an expectation by the exit gate.

    last, every   mean over the steps that are decoded
    gate          sum_i p_i loss_i - beta H(p) per token, p_i the probability of exit after pass i (nn/exit_gate.py)
    distil        loss of the last step + w * mean over the earlier steps of their divergence from the last

`gate` is the objective of Ouro's first stage (arXiv 2510.25741): without the entropy H all probability would go to the
pass that is best early in training, usually the last. `distil` teaches shallow readouts by the deep one (Zhang et al.
2019, "Be Your Own Teacher", arXiv 1905.08094), so that one model can be run at every depth up to the trained one.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from looped.config.recurrence import RecurrenceConfig
from looped.data.batch import Batch
from looped.nn.distillation import divergence, linear_divergence
from looped.nn.exit_gate import gate_of, log_chances
from looped.nn.projection import has_plain_head, head_logits
from looped.nn.rows import Rows
from looped.objectives.base import head_losses
from looped.tensor_types import Float


class Alike:
    """The mean loss of the states that are taken."""

    asks_gate: ClassVar[bool] = False

    def __init__(self, model: nn.Module, batch: Batch, rows: Rows, config: RecurrenceConfig):
        self.model = model
        self.batch = batch
        self.rows = rows
        self.config = config
        self.losses: list[Tensor] = []

    def take(self, state: Float[Tensor, "batch length ..."]) -> None:
        """Record a state that is decoded."""
        self.losses.append(self.batch.mean(self.read(state)))

    def read(self, state: Float[Tensor, "batch length ..."]) -> Float[Tensor, "batch length"]:
        """Cross-entropy of each token, decoded from a state."""
        return self.losses_of(self.model.hidden(state, self.rows))

    def losses_of(self, hidden: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length"]:
        """Cross-entropy of each token from the head's input."""
        return head_losses(self.model, hidden, self.batch.targets)

    def loss(self) -> Float[Tensor, ""]:
        return torch.stack(self.losses).mean()


class ByGate(Alike):
    """The expected loss under the gate's exit distribution, minus beta times its entropy."""

    asks_gate = True

    def __init__(self, model: nn.Module, batch: Batch, rows: Rows, config: RecurrenceConfig):
        super().__init__(model, batch, rows, config)
        self.odds: list[Tensor] = []

    def take(self, state: Float[Tensor, "batch length ..."]) -> None:
        self.losses.append(self.read(state))
        self.odds.append(gate_of(self.model)(self.model.recurrence.leave(state)))

    def loss(self) -> Float[Tensor, ""]:
        log_p = log_chances(torch.stack(self.odds))
        terms = log_p.exp() * (torch.stack(self.losses) + self.config.gate_entropy * log_p)
        return self.batch.mean(terms.sum(0)).mean()


class Distilled(Alike):
    """The loss of the last state, and `distil_weight` times the mean divergence of the earlier readouts from its own,
    which teaches without gradient."""

    def __init__(self, model: nn.Module, batch: Batch, rows: Rows, config: RecurrenceConfig):
        super().__init__(model, batch, rows, config)
        self.hidden: list[Tensor] = []

    def take(self, state: Float[Tensor, "batch length ..."]) -> None:
        self.hidden.append(self.model.hidden(state, self.rows))

    def loss(self) -> Float[Tensor, ""]:
        *shallow, deep = self.hidden
        value = self.batch.mean(self.losses_of(deep)).mean()
        if not shallow:  # a single pass, before the loop begins
            return value
        apart = self.divergences(torch.stack(shallow), deep.detach())
        return value + self.config.distil_weight * self.batch.mean(apart.mean(0)).mean()

    def divergences(self, shallow: Float[Tensor, "steps batch length width"],
                    deep: Float[Tensor, "batch length width"]) -> Float[Tensor, "steps batch length"]:
        """The divergence of each earlier readout from the last, by token."""
        temperature = self.config.distil_temperature
        if has_plain_head(self.model):
            return linear_divergence(shallow, deep, self.model.head_weight, temperature=temperature)
        with torch.no_grad():
            taught = head_logits(self.model, deep)
        return divergence(head_logits(self.model, shallow), taught, temperature=temperature)


READINGS: dict[str, type[Alike]] = {"last": Alike, "every": Alike, "gate": ByGate, "distil": Distilled}
