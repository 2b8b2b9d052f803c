"""Early exit: each problem of a batch leaves the loop or the solver as soon as its answer has converged.

The first four measures are Huginn's (Geiping et al. 2025, arXiv 2502.05171, section 6.1), means over the predicted
cells:

    kl          KL(readout now || readout before), below 1e-3
    entropy     change of the readout's entropy, below 1e-3
    latent      change of the state (of the clean estimate, for a denoiser) relative to its norm, below 0.03
    answer      consecutive steps that gave the same answer, at least 3
    confidence  probability of the answer in the least confident cell, above 0.9
    head        probability of a learned head that the answer is right, above 0.5 (models trained by `one-step`)
    gate        cumulative exit probability of the model's gate, at least 0.9 in every cell (`model.exit_gate`)

The gate is Ouro's (arXiv 2510.25741): the probabilities p_i of its passes sum to 1 - (1 - lambda_1) ... (1 - lambda_i),
which reaches 1 only in the last pass, so `gate=1` never exits early. In Ouro each token exits by itself; a problem
exits with the last of its cells.

A custom exit is a subclass of `Exit`, named by the dotted path of the class.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from looped.data.batch import Batch
from looped.devices import to_device
from looped.errors import UserError, did_you_mean
from looped.import_path import class_at
from looped.inference.motion import moved
from looped.nn.checks import kind_of
from looped.nn.exit_gate import ExitGate
from looped.tensor_types import Bool, Float, Int

Halt = Callable[[Float[Tensor, "batch length states"], Batch], Float[Tensor, "batch"]]
"""(state, batch) -> logit that the answer is right."""


@dataclass(frozen=True)
class Moment:
    """One step of the active problems. logits: their readout, float32. latent: the state, or the clean estimate, behind
    it. before: (logits, latent) of the previous step, None at the first. same: consecutive steps with this answer.
    halt: the learned head, None if there is none. stays: ln of the probability, by the exit gate, that a cell has not
    exited yet; 0 if no exit uses it."""

    batch: Batch
    logits: Float[Tensor, "rows length symbols"]
    latent: Float[Tensor, "rows length width"]
    before: tuple[Tensor, Tensor] | None
    same: Int[Tensor, "rows"]
    halt: Halt | None = None
    stays: Float[Tensor, "rows length"] | None = None


Settled = Callable[[Moment], Bool[Tensor, "rows"]]
"""Moment -> true for each problem that stops after this step."""


class Exit:
    """A stopping rule: a problem exits at the first step at which it has `settled`."""

    default: ClassVar[float]
    """The threshold if none is given."""
    needs_halt: ClassVar[bool] = False
    """True if it uses the learned head."""
    needs_gate: ClassVar[bool] = False
    """True if it uses the exit gate of the model."""

    def __init__(self, kind: str, threshold: float | None = None):
        self.kind = kind
        self.threshold: float = self.default if threshold is None else threshold

    @staticmethod
    def of(rule: "Exit | str | Settled") -> "Exit":
        """An exit as it is, from its text (`parse`), or from a function `(moment) -> Bool[Tensor, "rows"]`."""
        if isinstance(rule, Exit):
            return rule
        return Exit.parse(rule) if isinstance(rule, str) else Called(rule)

    @staticmethod
    def parse(text: str) -> "Exit":
        """Exit of a text: `kl`, or `kl=1e-4` with another threshold; or the dotted path of a custom class or function.
        Raises UserError."""
        kind, equals, value = text.strip().partition("=")
        made = _rule_at(kind)
        if not isinstance(made, type):
            if equals:
                raise UserError(f"exit {kind} is a function, which has no threshold; leave ={value} out, or make it a "
                                f"subclass of looped.inference.exits.Exit")
            return Called(made, kind)
        try:
            threshold = float(value) if equals else made.default
        except ValueError:
            threshold = math.nan
        if not threshold >= 0:
            raise UserError(f"exit {text!r} has no threshold of 0 or more; write for instance {kind}={made.default}")
        return made(kind, threshold)

    @property
    def name(self) -> str:
        return f"{self.kind}={self.threshold:g}"

    def check(self, halt: Halt | None, gate: ExitGate | None) -> None:
        """Raises UserError if the run lacks what the exit needs: a learned head, or the exit gate of its model."""
        if self.needs_halt and halt is None:
            raise UserError(f"exit {self.kind} needs a learned head, and this run has none; train with --objective "
                            f"one-step, or choose another exit")
        if self.needs_gate and gate is None:
            raise UserError(f"exit {self.kind} needs the exit gate of a loop, and this run has none; train with "
                            f"--model.exit_gate true and --recurrence.loss_on gate, or choose another exit")

    def settled(self, moment: Moment) -> Bool[Tensor, "rows"]:
        """Mask of the problems that exit now."""
        raise NotImplementedError


class _Change(Exit):
    """Base of exits whose change from step to step is below the threshold."""

    def settled(self, moment: Moment) -> Bool[Tensor, "rows"]:
        if moment.before is None:
            return torch.zeros_like(moment.same, dtype=torch.bool)
        return self.change(moment, *moment.before) < self.threshold

    def change(self, moment: Moment, logits: Tensor, latent: Tensor) -> Float[Tensor, "rows"]:
        """The change from the previous readout and latent to those of the moment."""
        raise NotImplementedError


class Divergence(_Change):
    """KL(readout now || readout before)."""

    default: ClassVar[float] = 1e-3

    def change(self, moment: Moment, logits: Tensor, latent: Tensor) -> Float[Tensor, "rows"]:
        now, then = moment.logits.log_softmax(-1), logits.log_softmax(-1)
        return moment.batch.mean((now.exp() * (now - then)).sum(-1))


class Entropy(_Change):
    """The change of the readout's entropy."""

    default: ClassVar[float] = 1e-3

    def change(self, moment: Moment, logits: Tensor, latent: Tensor) -> Float[Tensor, "rows"]:
        now, then = moment.logits.log_softmax(-1), logits.log_softmax(-1)
        return moment.batch.mean(_entropy(now) - _entropy(then)).abs()


class Latent(_Change):
    """The change of the latent in the predicted cells, relative to its norm."""

    default: ClassVar[float] = 0.03

    def settled(self, moment: Moment) -> Bool[Tensor, "rows"]:
        if moment.before is None:
            return torch.zeros_like(moment.same, dtype=torch.bool)
        change, norm = moved(moment.before[1], moment.latent, moment.batch.sought.unsqueeze(-1))
        return change < self.threshold * norm


class Answer(Exit):
    """The number of consecutive steps that gave the same answer."""

    default: ClassVar[float] = 3

    def settled(self, moment: Moment) -> Bool[Tensor, "rows"]:
        return moment.same >= self.threshold


class Confidence(Exit):
    """The probability of the answer in the least confident cell."""

    default: ClassVar[float] = 0.9

    def settled(self, moment: Moment) -> Bool[Tensor, "rows"]:
        sure = moment.logits.softmax(-1).amax(-1).masked_fill(~moment.batch.sought, 1.0)
        return sure.amin(1) > self.threshold


class Head(Exit):
    """The probability of a learned head that the answer is right."""

    default: ClassVar[float] = 0.5
    needs_halt = True

    def settled(self, moment: Moment) -> Bool[Tensor, "rows"]:
        return torch.sigmoid(moment.halt(moment.latent, moment.batch)) > self.threshold


class Gate(Exit):
    """The cumulative exit probability of the model's exit gate, in the cell where it is lowest."""

    default: ClassVar[float] = 0.9
    needs_gate = True

    def settled(self, moment: Moment) -> Bool[Tensor, "rows"]:
        most = math.log1p(-self.threshold) if self.threshold < 1 else -math.inf
        return ((moment.stays <= most) | ~moment.batch.sought).all(1)


class Called(Exit):
    """An exit that is a function of the moment."""

    default: ClassVar[float] = math.nan

    def __init__(self, function: Settled, name: str | None = None):
        super().__init__(name or getattr(function, "__name__", "exit"))
        self.function = function

    @property
    def name(self) -> str:
        return self.kind

    def settled(self, moment: Moment) -> Bool[Tensor, "rows"]:
        found = self.function(moment)
        if not isinstance(found, Tensor) or found.dtype != torch.bool or found.shape != moment.same.shape:
            raise UserError(f"exit {self.name} must return a bool tensor of {len(moment.same)} rows, true for each "
                            f"problem that stops, but returned {kind_of(found)}")
        return found


EXITS: dict[str, type[Exit]] = {"kl": Divergence, "entropy": Entropy, "latent": Latent, "answer": Answer,
                                "confidence": Confidence, "head": Head, "gate": Gate}


def _rule_at(kind: str) -> type[Exit] | Settled:
    """The class of an exit, or a custom function. Raises UserError."""
    if kind in EXITS:
        return EXITS[kind]
    if "." not in kind:
        raise UserError(f"exit '{kind}' is unknown{did_you_mean(kind, EXITS)}")
    made: Any = class_at(kind, "exit")
    if isinstance(made, type) and not (issubclass(made, Exit) and hasattr(made, "default")):
        raise UserError(f"exit {kind} is no exit; give the dotted path of a function of the moment, or of a subclass "
                        f"of looped.inference.exits.Exit that has a `default` threshold")
    return made


class EarlyExit:
    """Early-exit state of a batch: the active problems, with the last readout and the number of steps of each.

    working: indices of the problems still running, and `numbers` the same on the host. used (B,): steps of each
    problem. logits (B, L, V): last readouts; latent (B, L, D): states or estimates behind them. Without an exit all
    problems run to the end, and the host reads nothing from a device; with one it reads once a step. halt, gate: the
    learned head and the exit gate that the exits `head` and `gate` need. Raises UserError if the one needed is missing.
    """

    def __init__(self, batch: Batch, exit: Exit | None = None, *, halt: Halt | None = None,
                 gate: ExitGate | None = None):
        if exit is not None:
            exit.check(halt, gate)
        num = len(batch)
        self.batch = batch
        self.exit = exit
        self.halt = halt
        self.gate: ExitGate | None = gate if exit is not None and exit.needs_gate else None
        self.numbers: Tensor = torch.arange(num)
        self.working: Tensor = torch.arange(num, device=batch.inputs.device)
        self.steps: int = 0
        """The number of steps of the problems still running."""
        self.used: Tensor = torch.zeros(num, dtype=torch.long, device=batch.inputs.device)
        self.logits: Float[Tensor, "batch length symbols"] | None = None
        self.latent: Float[Tensor, "batch length width"] | None = None
        self._stays = torch.zeros(batch.targets.shape, device=batch.targets.device)
        self._same = torch.zeros_like(self.used)

    def take(self, logits: Tensor, latent: Tensor) -> None:
        """Record a step of the active problems: their readout, and the state (or estimate) behind it."""
        rows = self.working
        done = None if self.exit is None else self.exit.settled(self._moment(rows, logits.float(), latent.float()))
        if self.logits is None:
            self.logits, self.latent = logits.float(), latent.float()
        else:
            self.logits, self.latent = (old.index_copy(0, rows, new.float())
                                         for old, new in ((self.logits, logits), (self.latent, latent)))
        self.go_on()
        if done is not None and bool((done := done.cpu()).any()):
            self.numbers = self.numbers[~done]
            self.working = to_device(self.numbers, rows.device)

    def go_on(self) -> None:
        """Count a step of the active problems, which without a readout cannot exit."""
        self.used[self.working] += 1
        self.steps += 1

    def _moment(self, rows: Tensor, logits: Tensor, latent: Tensor) -> Moment:
        batch, before = self.batch[rows], None
        if self.logits is not None:
            before = self.logits[rows], self.latent[rows]
            same = ((logits.argmax(-1) == before[0].argmax(-1)) | ~batch.sought).all(1)
            self._same[rows] = torch.where(same, self._same[rows], 0)
        self._same[rows] += 1
        if self.gate is not None:
            self._stays[rows] += logsigmoid(-self.gate(latent)).float()
        return Moment(batch, logits, latent, before, self._same[rows], self.halt, self._stays[rows])


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(-1)
