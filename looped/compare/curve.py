"""Training curves, a held-out metric against the budget spent: the budget at which a curve first reaches a target, and
the metric at a given budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

BUDGETS = ("seconds", "tokens", "layer_forwards")
"""Budgets that a curve can be plotted against."""
UNITS = {"seconds": "seconds", "tokens": "tokens", "layer_forwards": "layer forwards"}


@dataclass(frozen=True)
class Metric:
    """The metric that a comparison follows through training: `field` of the held-out lines of metrics.jsonl, `name` and
    `remark` in sentences, `axis` in plots. `worst`: the worst possible value, which needs no training. `examples`: the
    plural noun for the items it averages over. `is_share`: True for a fraction of right answers, each 1 or 0.
    `milestones`: values whose budgets a report gives; none: no table of progress."""

    field: str
    name: str
    remark: str
    axis: str
    higher_is_better: bool
    worst: float
    examples: str
    is_share: bool
    milestones: tuple[float, ...] = ()

    def as_good(self, value: float, wanted: float) -> bool:
        return value >= wanted if self.higher_is_better else value <= wanted


def crossing(curve: Sequence[dict[str, Any]], wanted: float, gauge: Metric) -> dict[str, Any] | None:
    """Amount of each budget spent when a curve first reaches `wanted`, interpolated linearly between evaluations.
    `early`: the first evaluation already reaches it. None if no evaluation does."""
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


def value_at(curve: Sequence[dict[str, Any]], unit: str, spent: float, gauge: Metric) -> float | None:
    """The metric after `spent` of a budget, interpolated linearly between evaluations. None before the first
    evaluation, but for the step before it, since an evaluation after a fraction of the budget comes with the first
    step past it; constant after the last one, which is at the end of training."""
    step = curve[0][unit] / curve[0]["step"]
    return values_at(curve, unit, [spent], gauge).item() if spent + step > curve[0][unit] else None


def values_at(curve: Sequence[dict[str, Any]], unit: str, spent: ArrayLike, gauge: Metric) -> np.ndarray:
    """The metric at N amounts of a budget, (N,): linear between evaluations, constant outside them."""
    return np.interp(spent, [line[unit] for line in curve], [line[gauge.field] for line in curve])
