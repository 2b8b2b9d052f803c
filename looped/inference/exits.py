"""When to stop: each problem of a batch leaves the loop, or the solver, as soon as its answer has settled.

The first four measures are Huginn's (Geiping et al. 2025, arXiv 2502.05171, section 6.1), means over the cells that are
sought:

    kl          KL(readout now || readout before), below 1e-3
    entropy     change of the readout's entropy, below 1e-3
    latent      change of the state (of the clean estimate, for a denoiser) relative to its norm, below 0.03
    answer      steps in a row that gave the same answer, at least 3
    confidence  probability of the answer in the cell that is least sure, above 0.9
    head        probability of a learned head that the answer is right, above 0.5 (models trained by `one-step`)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from looped.data.batch import Batch
from looped.errors import UserError, did_you_mean

THRESHOLDS: dict[str, float] = {"kl": 1e-3, "entropy": 1e-3, "latent": 0.03, "answer": 3, "confidence": 0.9,
                                "head": 0.5}
"""Exit -> its default threshold."""

Halt = Callable[[Float[Tensor, "batch length width"], Batch], Float[Tensor, "batch"]]
"""(state, batch) -> logit that the answer is right."""


@dataclass(frozen=True)
class Exit:
    """A rule to stop by."""

    kind: str
    threshold: float

    @staticmethod
    def parse(text: str) -> "Exit":
        """`kl`, or `kl=1e-4` with another threshold. Raises UserError."""
        kind, equals, value = text.strip().partition("=")
        if kind not in THRESHOLDS:
            raise UserError(f"exit '{kind}' is unknown{did_you_mean(kind, THRESHOLDS)}")
        try:
            threshold = float(value) if equals else THRESHOLDS[kind]
        except ValueError:
            threshold = math.nan
        if not threshold >= 0:
            raise UserError(f"exit {text!r} has no threshold of 0 or more; write for instance "
                            f"{kind}={THRESHOLDS[kind]}")
        return Exit(kind, threshold)

    @property
    def name(self) -> str:
        return f"{self.kind}={self.threshold:g}"


class Stopping:
    """Which problems of a batch are still at work; the readout and the number of steps that each left with.

    active (B,): who is at work. used (B,): the steps each has taken. logits (B, L, V): each one's last readout.
    Without an exit all go on to the end. `halt` is the learned head that the exit `head` asks. Raises UserError where
    it is missing.
    """

    def __init__(self, batch: Batch, exit: Exit | None = None, *, halt: Halt | None = None):
        if exit is not None and exit.kind == "head" and halt is None:
            raise UserError("exit head asks a learned head, and this run has none; train with --objective one-step, or "
                            "choose another exit")
        num = len(batch)
        self.batch, self.exit, self.halt = batch, exit, halt
        self.active = torch.ones(num, dtype=torch.bool, device=batch.inputs.device)
        self.used = torch.zeros(num, dtype=torch.long, device=batch.inputs.device)
        self.logits: Float[Tensor, "batch length symbols"] | None = None
        self._latent: Tensor | None = None
        self._same = torch.zeros_like(self.used)

    @property
    def working(self) -> Tensor:
        """The numbers of the rows still at work."""
        return self.active.nonzero().squeeze(1)

    def take(self, logits: Tensor, latent: Tensor) -> None:
        """One more step of the rows at work: their readout, and the state (or estimate) behind it."""
        rows = self.working
        batch = self.batch[rows]
        done = self._has_settled(rows, batch, logits.float(), latent.float())
        if self.logits is None:
            self.logits, self._latent = logits.float(), latent.float()
        else:
            self.logits, self._latent = (old.index_copy(0, rows, new.float())
                                         for old, new in ((self.logits, logits), (self._latent, latent)))
        self.used[rows] += 1
        self.active[rows[done]] = False

    def go_on(self) -> None:
        """One more step of the rows at work, of which nobody asks the readout: no exit can be taken there."""
        self.used[self.working] += 1

    def _has_settled(self, rows: Tensor, batch: Batch, logits: Tensor, latent: Tensor) -> Bool[Tensor, "rows"]:
        nobody = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        if self.exit is None:
            return nobody
        kind, threshold = self.exit.kind, self.exit.threshold
        if kind == "head":
            return torch.sigmoid(self.halt(latent, batch)) > threshold
        if kind == "confidence":
            return logits.softmax(-1).amax(-1).masked_fill(~batch.sought, 1.0).amin(1) > threshold
        if self.logits is None:
            self._same[rows] = 1
            return self._same >= threshold if kind == "answer" else nobody
        before, latent_before = self.logits[rows], self._latent[rows]
        if kind == "answer":
            same = ((logits.argmax(-1) == before.argmax(-1)) | ~batch.sought).all(1)
            self._same[rows] = torch.where(same, self._same[rows] + 1, 1)
            return self._same[rows] >= threshold
        if kind == "latent":
            keep = batch.sought.unsqueeze(-1)
            change = ((latent - latent_before) * keep).flatten(1).norm(dim=1)
            return change < threshold * (latent * keep).flatten(1).norm(dim=1)
        now, then = logits.log_softmax(-1), before.log_softmax(-1)
        if kind == "kl":
            return batch.mean((now.exp() * (now - then)).sum(-1)) < threshold
        return batch.mean(_entropy(now) - _entropy(then)).abs() < threshold


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(-1)
