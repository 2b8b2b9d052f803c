"""MAUVE: closeness of the distributions of generated and real texts, in the feature space of an encoder.

Pillutla et al. 2021 (arXiv 2102.01454), computed by the authors' package. A score is meaningful only together with the
encoder's name, the number of texts and their length: all three change it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from looped.data.batch import Batch
from looped.errors import UserError
from looped.evaluation.metric_rows import Row
from looped.inference.rollout import rollout_of
from looped.objectives.base import Objective
from looped.rng import StepRandom
from looped.tensor_types import Float

ENOUGH = 1000
"""Number of texts below which the authors advise against relying on a score; they use 5,000."""


@runtime_checkable
class Encoder(Protocol):
    """Text encoder: a run of this toolkit (`RunEncoder`), or a Hub model (`looped.hub`)."""

    name: str

    def features(self, texts: Sequence[str]) -> Float[Tensor, "num width"]:
        """One vector per text."""


class RunEncoder:
    """A loop at one depth as encoder: the head's input at a text's last token. Raises `UserError` for a denoiser, whose
    state is that of the token to predict."""

    def __init__(self, name: str, objective: Objective, depth: int, encode: Callable[[str], list[int]]):
        if not rollout_of(objective).encodes:
            raise UserError(f"encoder {name} is a denoiser; choose a run of --objective ar, truncated or full")
        self.name = name
        self.objective: Objective = objective.eval()
        self.depth = depth
        self.encode = encode

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> Float[Tensor, "num width"]:
        """One vector per text, encoded one by one, so unequal lengths need no padding."""
        return torch.stack([self._feature(text, row) for row, text in enumerate(texts)])

    def _feature(self, text: str, row: int) -> Float[Tensor, "width"]:
        ids = self.encode(text) or [0]  # only end-of-text tokens
        tokens = torch.tensor([[*ids, 0]], device=next(self.objective.parameters()).device)
        random = StepRandom(0, 0, start=row, count=1, device=tokens.device)
        hidden = rollout_of(self.objective).hidden(Batch.of(tokens), self.depth,
                                                   lambda e: random.normal("state", e.shape[1:]))
        return hidden[0, -1].float().cpu()


def mauve(real: Float[Tensor, "num_real width"], written: Float[Tensor, "num width"], *, seed: int = 0) -> float:
    """MAUVE score between 0 and 1; higher is closer. seed: of the clustering. Raises `UserError` if the package is
    missing."""
    try:
        from mauve import compute_mauve
    except ImportError:
        raise UserError("MAUVE needs the package mauve-text; pip install 'looped[mauve]'") from None
    return float(compute_mauve(p_features=real.numpy(), q_features=written.numpy(), seed=seed, verbose=False).mauve)


def mauve_rows(encoder: Encoder, real: Sequence[str], written: dict[int, Sequence[str]], *, seed: int = 0) -> list[Row]:
    """MAUVE of the texts of each depth, `by` the encoder; without an interval, because a set of texts has one score."""
    features = encoder.features(real)
    return [Row("mauve", mauve(features, encoder.features(texts), seed=seed), None, None, len(texts), depth=depth,
                by=encoder.name) for depth, texts in written.items()]
