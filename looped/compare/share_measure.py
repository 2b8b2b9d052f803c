"""Measures of comparisons that count right answers: which held-out problems are solved, or which images are named
rightly, over depth."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from looped.compare.measure import Common, Measured, Measurer
from looped.evaluation.rows import Row

CHOOSING, REPORTED = slice(0, None, 2), slice(1, None, 2)
"""The half of what is held out that a best depth is chosen on, and the half that every figure is read from: the best of
several noisy figures is too good on the problems it was the best on."""


@dataclass(frozen=True)
class ShareMeasured(Measured):
    """One run: `right[difficulty][depth]` says which held-out problems are solved (1 or 0); images have one difficulty,
    None."""

    right: dict[int | None, dict[int, Float[Tensor, "num"]]]

    @property
    def hardest(self) -> int | None:
        """The difficulty that the curve of training follows."""
        return None

    @property
    def followed(self) -> Float[Tensor, "half"]:
        """At the depth that is best for the other half, the shallowest of equals."""
        by_depth = self.right[self.hardest]
        best = max(sorted(by_depth), key=lambda depth: by_depth[depth][CHOOSING].mean().item())
        return self.reported(self.hardest, best)

    def reported(self, difficulty: int | None, depth: int) -> Float[Tensor, "half"]:
        """Of the half that is reported."""
        return self.right[difficulty][depth][REPORTED]


class ShareMeasurer(Measurer):
    """Asks the same of every arm and seed."""

    keys: ClassVar[frozenset[str]] = frozenset({"right"})
    measured: ClassVar[type[ShareMeasured]]

    def made(self, found: Mapping[str, Any], common: Common) -> ShareMeasured:
        right = {json.loads(difficulty): {int(depth): torch.tensor(each, dtype=torch.float64)
                                          for depth, each in by_depth.items()}
                 for difficulty, by_depth in found["right"].items()}
        return self.measured(*common, right=right)


def as_json(rows: Sequence[Row], right: Mapping[int | None, Mapping[int, Bool[Tensor, "num"]]]) -> dict[str, Any]:
    """What an evaluation has found, as its file holds it."""
    return {"rows": [row.as_dict() for row in rows],
            "right": {json.dumps(difficulty): {str(depth): each.int().tolist() for depth, each in by_depth.items()}
                      for difficulty, by_depth in right.items()}}
