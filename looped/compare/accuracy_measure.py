"""Measurement of runs by their right answers: which held-out problems are solved, or images classified correctly, by
depth."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from looped.compare.measure import Common, Measured, Measurer
from looped.evaluation.metric_rows import Row
from looped.tensor_types import Bool, Float

CHOOSING, REPORTED = slice(0, None, 2), slice(1, None, 2)
"""The half of the held-out examples on which the best depth is chosen, and the half that is reported: the best of
several noisy values is biased upwards on the examples it was chosen on."""


@dataclass(frozen=True)
class ShareMeasured(Measured):
    """One measured run. `right[difficulty][depth]`: 1 for each held-out problem that is solved, else 0; images have a
    single difficulty, None. `by_any`: 1 for each that any of several trajectories solves; empty where that is not
    measured."""

    right: dict[int | None, dict[int, Float[Tensor, "num"]]]
    by_any: dict[int | None, dict[int, Float[Tensor, "num"]]] = field(default_factory=dict)

    @property
    def hardest(self) -> int | None:
        """The difficulty that the training curve follows."""
        return None

    @property
    def followed(self) -> Float[Tensor, "half"]:
        """The reported half at the depth that is best on the choosing half; ties go to the shallowest depth."""
        by_depth = self.right[self.hardest]
        best = max(sorted(by_depth), key=lambda depth: by_depth[depth][CHOOSING].mean().item())
        return self.reported(self.hardest, best)

    def reported(self, difficulty: int | None, depth: int) -> Float[Tensor, "half"]:
        """1 or 0 for each example of the reported half."""
        return self.right[difficulty][depth][REPORTED]


class ShareMeasurer(Measurer):
    """Measurer whose evaluations hold right answers; every arm and seed gets the same examples."""

    keys: ClassVar[frozenset[str]] = frozenset({"right"})
    measured: ClassVar[type[ShareMeasured]]

    def made(self, found: Mapping[str, Any], common: Common) -> ShareMeasured:
        return self.measured(*common, right=_tensors(found["right"]), by_any=_tensors(found.get("by_any", {})))


def as_json(rows: Sequence[Row], right: Mapping[int | None, Mapping[int, Bool[Tensor, "num"]]]) -> dict[str, Any]:
    """The result of an evaluation as JSON values."""
    return {"rows": [row.as_dict() for row in rows], "right": by_text(right)}


def by_text(masks: Mapping[int | None, Mapping[int, Bool[Tensor, "num"]]]) -> dict[str, dict[str, list[int]]]:
    """Masks by difficulty and depth as JSON values."""
    return {json.dumps(difficulty): {str(depth): each.int().tolist() for depth, each in by_depth.items()}
            for difficulty, by_depth in masks.items()}


def _tensors(found: Mapping[str, Mapping[str, list[int]]]) -> dict[int | None, dict[int, Tensor]]:
    """The inverse of `by_text`."""
    return {json.loads(difficulty): {int(depth): torch.tensor(each, dtype=torch.float64)
                                     for depth, each in by_depth.items()} for difficulty, by_depth in found.items()}
