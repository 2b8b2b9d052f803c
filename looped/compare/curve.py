"""The curve of a run: a held-out figure against what training has spent, and when it first was as good as another."""

from collections.abc import Sequence
from dataclasses import dataclass

BUDGETS = ("seconds", "tokens", "layer_forwards")
"""What a curve can be drawn against."""
UNITS = {"seconds": "seconds", "tokens": "tokens", "layer_forwards": "layer forwards"}


@dataclass(frozen=True)
class Gauge:
    """The figure that a comparison follows through training: `field` of the held-out lines of metrics.jsonl, `name` and
    `remark` in sentences, `axis` in pictures. `worst`: what needs no training to be reached."""

    field: str
    name: str
    remark: str
    axis: str
    higher_is_better: bool
    worst: float

    def as_good(self, value: float, wanted: float) -> bool:
        return value >= wanted if self.higher_is_better else value <= wanted


def crossing(curve: Sequence[dict], wanted: float, gauge: Gauge) -> dict | None:
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
