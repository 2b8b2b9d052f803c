"""Arms at matched compute: each arm's held-out metric at the largest budget that every run reached.

A comparison fixes one budget, and at its end the arms match only in that one: after the same number of seconds, one arm
has done more layer forwards than another. The largest amount of each budget that all runs reached lies on every curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from looped.compare.curve import BUDGETS, UNITS, value_at
from looped.compare.plan import Plan
from looped.compare.summary import ArmSummary, Spread, spread
from looped.compare.table_cells import mean_cell, over_seeds
from looped.reports.sections import Table

LATER = "first measured later"
"""The cell of an arm whose first evaluation lies beyond the budget."""


@dataclass(frozen=True)
class AtEqual:
    """The metric of an arm after `spent` of `budget`. `value`: over the seeds measured by then, None if there are none;
    `num_seeds`: all seeds of the arm."""

    arm: str
    budget: str
    spent: float
    value: Spread | None
    num_seeds: int

    @property
    def cell(self) -> str:
        """`0.912 ± 0.013`, with a remark if seeds are missing."""
        if self.value is None:
            return LATER
        few = f" ({self.value.num} of {self.num_seeds} seeds, the others {LATER})"
        return mean_cell(self.value) + (few if self.value.num < self.num_seeds else "")

    def as_dict(self) -> dict[str, Any]:
        """The row of compare.jsonl; `num` is the number of seeds measured by then."""
        mean, sd, num = (self.value.mean, self.value.sd, self.value.num) if self.value else (None, None, 0)
        return {"arm": self.arm, "budget": self.budget, "spent": self.spent, "mean": mean, "sd": sd, "num": num}


def spent_by_all(arms: Sequence[ArmSummary]) -> dict[str, float]:
    """The largest amount of each of `BUDGETS` that every run of every arm reached."""
    return {unit: min(run.curve[-1][unit] for arm in arms for run in arm.runs) for unit in BUDGETS}


def at_equal(arms: Sequence[ArmSummary]) -> list[AtEqual]:
    """Every arm at each of `BUDGETS`."""
    return [at_budget(arm, unit, spent) for arm in arms for unit, spent in spent_by_all(arms).items()]


def at_budget(arm: ArmSummary, unit: str, spent: float) -> AtEqual:
    """An arm after `spent` of a budget."""
    values = [value_at(run.curve, unit, spent, run.gauge) for run in arm.runs]
    known = [value for value in values if value is not None]
    return AtEqual(arm.name, unit, spent, spread(known) if known else None, len(values))


def equal_table(arms: Sequence[ArmSummary]) -> Table:
    """One line per arm, one column per budget: `after 60 seconds`."""
    cells = {(each.arm, each.budget): each.cell for each in at_equal(arms)}
    header = ["arm", *(f"after {amount(spent)} {UNITS[unit]}" for unit, spent in spent_by_all(arms).items())]
    return Table(header, [[arm.name, *(cells[arm.name, unit] for unit in BUDGETS)] for arm in arms])


def amount(spent: float) -> str:
    """`1,234,567`; three significant digits below 100, as in `2.31`."""
    return f"{spent:,.0f}" if spent >= 100 else f"{spent:.3g}"


def equal_note(arms: Sequence[ArmSummary], plan: Plan) -> str:
    """Explanation of the table."""
    gauge = arms[0].runs[0].gauge
    return (f"Held-out {gauge.name}{gauge.remark} ({'higher' if gauge.higher_is_better else 'lower'} is better) at "
            f"matched budgets: the largest number of seconds, tokens and layer forwards that every run of every arm "
            f"reached. Values are interpolated linearly between the evaluations during training; "
            f"{over_seeds(plan)}."
            + f" {LATER}: no evaluation by then." * any(LATER in each.cell for each in at_equal(arms)))
