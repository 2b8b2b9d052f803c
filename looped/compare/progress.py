"""Progress of arms through training: the metric after fractions of the budget, and the budget at which each arm first
reaches given values of it (`Metric.milestones`).

Both are read off the training curves in the unit of the comparison's budget, so a report says how far an arm gets with
less training as well as with all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from looped.compare.curve import UNITS, crossing
from looped.compare.matched_compute import AtEqual, amount, at_budget, spent_by_all
from looped.compare.plan import Plan
from looped.compare.summary import ArmSummary, Spread, spread
from looped.compare.table_cells import over_seeds
from looped.reports.sections import Heading, Prose, Section, Table

FRACTIONS = (0.1, 0.2, 0.5, 1.0)
"""Fractions of the largest budget that every run reached."""


@dataclass(frozen=True)
class Reached:
    """The budget at which an arm first reaches `milestone`. `spent`: over the seeds that reach it, None if none does;
    `early`: some of them at their first evaluation, so that `spent` is an upper bound; `num_seeds`: all seeds."""

    arm: str
    budget: str
    milestone: float
    spent: Spread | None
    early: bool
    num_seeds: int

    @property
    def cell(self) -> str:
        """`42.1 ± 3.0`, with the number of seeds if some fail to reach it."""
        if self.spent is None:
            return "not reached"
        sd = "" if self.spent.sd != self.spent.sd else f" ± {amount(self.spent.sd)}"
        few = f" ({self.spent.num} of {self.num_seeds} seeds)" if self.spent.num < self.num_seeds else ""
        return f"{'at most ' * self.early}{amount(self.spent.mean)}{sd}{few}"

    def as_dict(self) -> dict[str, Any]:
        """The row of compare.jsonl; `num` is the number of seeds that reach it."""
        mean, sd, num = (self.spent.mean, self.spent.sd, self.spent.num) if self.spent else (None, None, 0)
        return {"kind": "reached", "arm": self.arm, "budget": self.budget, "milestone": self.milestone, "mean": mean,
                "sd": sd, "num": num, "num_seeds": self.num_seeds, "early": self.early}


def progress(arms: Sequence[ArmSummary], plan: Plan) -> dict[float, list[AtEqual]]:
    """Fraction of the budget -> every arm there, but for fractions before every first evaluation; none for a metric
    without milestones."""
    if not arms[0].runs[0].gauge.milestones:
        return {}
    unit = unit_of(plan)
    whole = spent_by_all(arms)[unit]
    found = {fraction: [at_budget(arm, unit, fraction * whole) for arm in arms] for fraction in FRACTIONS}
    return {fraction: there for fraction, there in found.items() if any(each.value for each in there)}


def reached(arms: Sequence[ArmSummary], plan: Plan) -> list[Reached]:
    """Every arm at every milestone of its metric."""
    return [_reached(arm, milestone, unit_of(plan)) for arm in arms for milestone in arm.runs[0].gauge.milestones]


def unit_of(plan: Plan) -> str:
    """The unit of the comparison's budget, as a key of a curve."""
    return plan.unit.replace("-", "_")


def _reached(arm: ArmSummary, milestone: float, unit: str) -> Reached:
    points = [crossing(run.curve, milestone, run.gauge) for run in arm.runs]
    found = [point for point in points if point is not None]
    spent = spread([point[unit] for point in found]) if found else None
    return Reached(arm.name, unit, milestone, spent, any(point["early"] for point in found), len(points))


def progress_rows(arms: Sequence[ArmSummary], plan: Plan) -> list[dict[str, Any]]:
    """The rows of compare.jsonl of kind `progress` and `reached`."""
    over = [{"kind": "progress", "fraction": fraction, **each.as_dict()}
            for fraction, found in progress(arms, plan).items() for each in found]
    return over + [each.as_dict() for each in reached(arms, plan)]


def progress_sections(arms: Sequence[ArmSummary], plan: Plan) -> list[Section]:
    """The table of the report; nothing for a metric without milestones."""
    gauge, over = arms[0].runs[0].gauge, progress(arms, plan)
    if not over:
        return []
    unit = UNITS[unit_of(plan)]
    there = {(each.arm, each.milestone): each.cell for each in reached(arms, plan)}
    header = ["arm", *(f"after {amount(found[0].spent)} {unit}" for found in over.values()),
              *(f"{unit} to {milestone}" for milestone in gauge.milestones)]
    lines = [[arm.name, *(found[i].cell for found in over.values()),
              *(there[arm.name, milestone] for milestone in gauge.milestones)] for i, arm in enumerate(arms)]
    return [Heading("Progress through training"),
            Prose(f"Held-out {gauge.name}{gauge.remark} after part of the training, and the {unit} of training after "
                  f"which it is first reached, interpolated linearly between evaluations; {over_seeds(plan)}."),
            Table(header, lines)]
