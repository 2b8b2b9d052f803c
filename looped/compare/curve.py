"""The curve of a run: a held-out figure against what training has spent, read along either: when it first was as good
as another, and what it was when so much had been spent."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

BUDGETS = ("seconds", "tokens", "layer_forwards")
"""What a curve can be drawn against."""
UNITS = {"seconds": "seconds", "tokens": "tokens", "layer_forwards": "layer forwards"}


@dataclass(frozen=True)
class Gauge:
    """The figure that a comparison follows through training: `field` of the held-out lines of metrics.jsonl, `name` and
    `remark` in sentences, `axis` in pictures. `worst`: what needs no training to be reached. `examples`: what it is a
    mean over, in words. `is_share`: of right answers, each 1 or 0."""

    field: str
    name: str
    remark: str
    axis: str
    higher_is_better: bool
    worst: float
    examples: str
    is_share: bool

    def as_good(self, value: float, wanted: float) -> bool:
        return value >= wanted if self.higher_is_better else value <= wanted


def crossing(curve: Sequence[dict[str, Any]], wanted: float, gauge: Gauge) -> dict[str, Any] | None:
    """What had been spent when a curve was first as good as `wanted`: straight lines between evaluations, nothing
    before the first of them (`early`). None where it never was."""
    for i, line in enumerate(curve):
        now = line[gauge.field]
        if not gauge.as_good(now, wanted):
            continue
        if i == 0:
            return {unit: line[unit] for unit in BUDGETS} | {"early": True}
        before = curve[i - 1]
        part = (before[gauge.field] - wanted) / (before[gauge.field] - now)
        return {unit: before[unit] + part * (line[unit] - before[unit]) for unit in BUDGETS} | {"early": False}
    return None


def value_at(curve: Sequence[dict[str, Any]], unit: str, spent: float, gauge: Gauge) -> float | None:
    """The figure when `spent` of a budget had been spent, on the straight line between two evaluations. None before the
    first of them, where nothing is known; after the last, which is the end of training, it stays as it is."""
    return values_at(curve, unit, [spent], gauge).item() if spent >= curve[0][unit] else None


def values_at(curve: Sequence[dict[str, Any]], unit: str, spent: ArrayLike, gauge: Gauge) -> np.ndarray:
    """The figure at each of many amounts of a budget, (N,): straight lines between evaluations, level outside them."""
    return np.interp(spent, [line[unit] for line in curve], [line[gauge.field] for line in curve])
