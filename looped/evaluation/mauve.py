"""MAUVE: how near the distribution of written texts is to that of real ones, among the features of an encoder.

Pillutla et al. 2021 (arXiv 2102.01454), computed by the authors' package. A figure means something only beside the
encoder's name, the number of texts and their length: all three move it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from looped.data.batch import Batch
from looped.errors import UserError
from looped.evaluation.rows import Row
from looped.inference.rollout import rollout_of
from looped.objectives.base import Objective
from looped.rng import StepRandom

ENOUGH = 1000
"""Texts below which the authors advise not to read much into a figure; they use 5,000."""


@runtime_checkable
class Encoder(Protocol):
    """Whoever gives a text a vector: a run of this toolkit (`RunEncoder`), or a model of another (`looped.hub`)."""

    name: str

    def features(self, texts: Sequence[str]) -> Float[Tensor, "num width"]:
        """One vector a text."""


class RunEncoder:
    """A loop at one depth: what its head reads at a text's last token. Raises `UserError` for a denoiser, whose state
    is that of a token it seeks."""

    def __init__(self, name: str, objective: Objective, depth: int, encode: Callable[[str], list[int]]):
        if not rollout_of(objective).encodes:
            raise UserError(f"encoder {name} is a denoiser; choose a run of --objective ar, truncated or full")
        self.name = name
        self.objective: Objective = objective.eval()
        self.depth = depth
        self.encode = encode

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> Float[Tensor, "num width"]:
        """One vector a text, read one by one: rows of unequal lengths need no padding."""
        return torch.stack([self._feature(text, row) for row, text in enumerate(texts)])

    def _feature(self, text: str, row: int) -> Float[Tensor, "width"]:
        ids = self.encode(text) or [0]  # nothing but ends of text
        tokens = torch.tensor([[*ids, 0]], device=next(self.objective.parameters()).device)
        random = StepRandom(0, 0, start=row, count=1, device=tokens.device)
        hidden = rollout_of(self.objective).hidden(Batch.of(tokens), self.depth,
                                                   lambda e: random.normal("state", e.shape[1:]))
        return hidden[0, -1].float().cpu()


def mauve(real: Float[Tensor, "num_real width"], written: Float[Tensor, "num width"], *, seed: int = 0) -> float:
    """Between 0 and 1, the nearer the higher; `seed` is that of the clustering. Raises `UserError` where the package is
    missing."""
    try:
        from mauve import compute_mauve
    except ImportError:
        raise UserError("MAUVE needs the package mauve-text; pip install 'looped[mauve]'") from None
    return float(compute_mauve(p_features=real.numpy(), q_features=written.numpy(), seed=seed, verbose=False).mauve)


def mauve_rows(encoder: Encoder, real: Sequence[str], written: dict[int, Sequence[str]], *, seed: int = 0) -> list[Row]:
    """MAUVE of the texts of each depth, `by` the encoder; without an interval, for the figure is one of whole sets."""
    features = encoder.features(real)
    return [Row("mauve", mauve(features, encoder.features(texts), seed=seed), None, None, len(texts), depth=depth,
                by=encoder.name) for depth, texts in written.items()]
