"""When each arm had what another one ends with, as a share of what that one spent."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from looped.compare.curve import BUDGETS, UNITS, Gauge, crossing
from looped.compare.summary import ArmSummary, pairs


@dataclass(frozen=True)
class Reach:
    """When `arm` had the final figure of the arm `to`: as a share of its own training, and of what `to` spent in each
    of `BUDGETS`; means over the seeds that got there. `early`: some were there at their first evaluation already."""

    arm: str
    to: str
    final: float
    num_seeds: int
    num_reached: int
    own: float | None
    shares: dict[str, float]
    early: bool
    gauge: Gauge

    def as_dict(self) -> dict[str, Any]:
        """As a row; the final figure under the name of what it is."""
        row = asdict(self)
        del row["gauge"], row["final"]
        return row | {self.gauge.name.replace(" ", "_"): self.final}


def reaches(arms: Sequence[ArmSummary]) -> list[Reach]:
    """Of every arm, to the first one and to `truncated`."""
    targets = [arm for i, arm in enumerate(arms) if i == 0 or "truncated" in (arm.name, arm.text)]
    return _known(reach(arm, to) for to in targets for arm in arms if arm is not to)


def with_reverse(found: Sequence[Reach], arms: Sequence[ArmSummary]) -> list[Reach]:
    """After those that never get there: when the other one had what they end with."""
    by_name, told = {arm.name: arm for arm in arms}, {(each.arm, each.to) for each in found}
    lines: list[Reach] = []
    for each in found:
        lines.append(each)
        if not each.num_reached and (each.to, each.arm) not in told:
            lines += _known([reach(by_name[each.to], by_name[each.arm])])
    return lines


def _known(found) -> list[Reach]:
    return [each for each in found if each is not None]


def reach(arm: ArmSummary, to: ArmSummary) -> Reach | None:
    """When each run of an arm had the final figure of the other arm's run of the same seed; None where no seed is in
    both, and where there is nothing to reach."""
    paired, gauge = pairs(arm.runs, to.runs), arm.runs[0].gauge
    finals = [other.curve[-1][gauge.field] for _, other in paired]
    if all(final == gauge.worst for final in finals):
        return None
    points = [crossing(run.curve, final, gauge) for (run, _), final in zip(paired, finals, strict=True)]
    there = [(run, other, point) for (run, other), point in zip(paired, points, strict=True) if point is not None]
    shares = {unit: fmean(point[unit] / other.curve[-1][unit] for _, other, point in there)
              for unit in BUDGETS} if there else {}
    return Reach(arm.name, to.name, fmean(finals), len(paired), len(there),
                 fmean(point["seconds"] / run.curve[-1]["seconds"] for run, _, point in there) if there else None,
                 shares, any(point["early"] for _, _, point in there), gauge)


def sentence(reach: Reach) -> str:
    """`denoise reaches truncated's final loss (3.616) after 0.14 of its own seconds: ...`."""
    final = f"{reach.to}'s final {reach.gauge.name} ({reach.final:.3f})"
    if not reach.num_reached:
        return f"{reach.arm} does not reach {final}."
    seeds = "" if reach.num_reached == reach.num_seeds else f" in {reach.num_reached} of {reach.num_seeds} seeds"
    bound = "at most " if reach.early else ""
    shares = [f"{share:.2f} of {reach.to}'s {UNITS[unit]}" for unit, share in reach.shares.items()]
    return (f"{reach.arm} reaches {final}{seeds} after {bound}{reach.own:.2f} of its own seconds: {shares[0]}, "
            f"{shares[1]} and {shares[2]}.")
