"""Compute-to-target: the share of another arm's budget at which an arm had what that one ends with, where they can be
told apart.

Curves are noisy, and the first crossing of two noisy curves of equal arms is early as often as not. So a sentence needs
more than a crossing: either the final figures differ beyond their interval (`Gap.told`), or the other arm was not yet
there when so much had been spent (`_ahead`). Otherwise it says that no difference can be told.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from looped.compare.curve import BUDGETS, UNITS, Gauge, crossing, values_at
from looped.compare.measure import Measured
from looped.compare.summary import ArmSummary, Gap, gap, pairs
from looped.evaluation.rows import LEAST, student_interval


@dataclass(frozen=True)
class Reach:
    """When `arm` had the final figure of the arm `to`: as a share of its own training, and of what `to` spent in each
    of `BUDGETS`; means over the seeds that got there. `early`: some were there at their first evaluation already.
    `mine`: what `arm` itself ends with; `gap`: how far that is above the other's, paired; `ahead`: `to` itself had not
    been there when so much had been spent."""

    arm: str
    to: str
    final: float
    num_seeds: int
    num_reached: int
    own: float | None
    shares: dict[str, float]
    early: bool
    gauge: Gauge
    mine: float
    gap: Gap
    ahead: bool

    @property
    def better(self) -> bool:
        """True if the arm ends better, beyond noise."""
        return self.gap.told and (self.gap.mean > 0) == self.gauge.higher_is_better

    @property
    def worse(self) -> bool:
        return self.gap.told and not self.better

    @property
    def told(self) -> bool:
        """True if it is a finding that the arm gets there, or that it does not."""
        return (self.better or self.ahead) if self.num_reached else self.worse

    def as_dict(self) -> dict[str, Any]:
        """As a row; the final figure under the name of what it is."""
        inner = ("gauge", "final", "mine", "gap", "ahead")
        row = {name: value for name, value in asdict(self).items() if name not in inner}
        return row | {self.gauge.name.replace(" ", "_"): self.final, "told": self.told, "difference": self.gap.mean,
                      "ci_low": self.gap.low, "ci_high": self.gap.high}


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
        if not each.num_reached and each.told and (each.to, each.arm) not in told:
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
    apart = gap(arm.runs, to.runs)
    return Reach(arm.name, to.name, fmean(finals), len(paired), len(there),
                 fmean(point["seconds"] / run.curve[-1]["seconds"] for run, _, point in there) if there else None,
                 shares, any(point["early"] for _, _, point in there), gauge,
                 fmean(run.curve[-1][gauge.field] for run, _ in paired), apart,
                 len(there) == len(paired) and any(_ahead(there, unit, apart) for unit in BUDGETS))


def _ahead(there: Sequence[tuple[Measured, Measured, dict]], unit: str, apart: Gap) -> bool:
    """True if the other arm, when it had spent what took this one to its final figure, was short of that by more than
    noise: by more than half the interval of the paired final figures (for a share at least that of two independent
    ones) in the mean, and beyond Student's interval over several seeds."""
    gauge = there[0][0].gauge
    then = [values_at(other.curve, unit, [point[unit]], gauge).item() for _, other, point in there]
    finals = [other.curve[-1][gauge.field] for _, other, _ in there]
    sign = 1 if gauge.higher_is_better else -1
    short = [sign * (final - value) for final, value in zip(finals, then, strict=True)]
    noise = (apart.high - apart.low) / 2
    if gauge.is_share:
        noise = max(noise, 1.96 * math.sqrt(sum(p * (1 - p) for p in map(fmean, (finals, then))) / apart.num))
    over_seeds = len(short) == 1 or student_interval(short)[0] > 0
    return apart.num >= LEAST and fmean(short) > noise and over_seeds


def sentences(found: Sequence[Reach]) -> list[str]:
    """A sentence each; that no difference can be told between two arms is said once."""
    said, untold = [], set()
    for each in found:
        pair = frozenset((each.arm, each.to))
        if each.told or each.gap.told or pair not in untold:
            said.append(sentence(each))
        if not each.told:
            untold.add(pair)
    return said


def sentence(reach: Reach) -> str:
    """`denoise reaches truncated's final loss (3.616) after 0.14 of its own seconds: ...`; or that no difference can be
    told."""
    final = f"{reach.to}'s final {reach.gauge.name} ({reach.final:.3f})"
    if not reach.told:
        return _untold(reach, final)
    alone = " (1 seed: how far seeds differ is not known)" if reach.num_seeds == 1 else ""
    if not reach.num_reached:
        return f"{reach.arm} does not reach {final}{alone}."
    seeds = "" if reach.num_reached == reach.num_seeds else f" in {reach.num_reached} of {reach.num_seeds} seeds"
    bound = "at most " if reach.early else ""
    shares = [f"{share:.2f} of {reach.to}'s {UNITS[unit]}" for unit, share in reach.shares.items()]
    return (f"{reach.arm} reaches {final}{seeds} after {bound}{reach.own:.2f} of its own seconds: {shares[0]}, "
            f"{shares[1]} and {shares[2]}{alone}.")


def _untold(reach: Reach, final: str) -> str:
    """Where the crossing of two curves may be chance."""
    gap, seeds = reach.gap, "1 seed" if reach.num_seeds == 1 else f"{reach.num_seeds} seeds"
    spread = f", {min(gap.seeds):+.3f} to {max(gap.seeds):+.3f} by seed" if len(gap.seeds) > 1 else ""
    evidence = (f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] paired over {gap.num} held-out "
                f"{reach.gauge.examples}{spread}, {seeds}")
    if gap.told:  # the curve was there at some time, by chance or before it got worse
        return f"{reach.arm} ends {'ahead of' if reach.better else 'behind'} {final}: {evidence}."
    return f"No difference can be told between {reach.arm} ({reach.mine:.3f}) and {final}: {evidence}."
