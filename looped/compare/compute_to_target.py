"""Compute-to-target: the fraction of arm B's budget that arm A needs to match B's final metric.

Curves are noisy, and two noisy curves of equal arms often cross early. So a reported crossing needs more evidence:
either the final metrics differ by more than their interval (`Gap.told`), or B itself was still short of its final
metric after spending as much as A needed (`_ahead`). Otherwise the sentence reports no reliable difference.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from looped.compare.curve import BUDGETS, UNITS, Metric, crossing, values_at
from looped.compare.measure import Measured
from looped.compare.summary import ArmSummary, Gap, gap, pairs
from looped.evaluation.intervals import LEAST, student_interval, tells_sign


@dataclass(frozen=True)
class Reach:
    """Budget at which `arm` reaches `final`, the final metric of the arm `to`. `own`: as a fraction of the seconds of
    `arm`; `shares`: as a fraction of what `to` spent in each of `BUDGETS`; both are means over the seeds that reach it.
    `early`: some seeds reach it at their first evaluation, so the fractions are upper bounds. `mine`: the final metric
    of `arm`; `gap`: the paired difference of the two arms after training; `ahead`: after as much budget, `to` was still
    short of its own final metric."""

    arm: str
    to: str
    final: float
    num_seeds: int
    num_reached: int
    own: float | None
    shares: dict[str, float]
    early: bool
    gauge: Metric
    mine: float
    gap: Gap
    ahead: bool

    @property
    def better(self) -> bool:
        """True if the arm's final metric is better by more than noise."""
        return self.gap.told and (self.gap.mean > 0) == self.gauge.higher_is_better

    @property
    def worse(self) -> bool:
        return self.gap.told and not self.better

    @property
    def told(self) -> bool:
        """True if reaching the target, or failing to, is more than noise."""
        return (self.better or self.ahead) if self.num_reached else self.worse

    def as_dict(self) -> dict[str, Any]:
        """The row of compare.jsonl; the name of the metric is the key of the final value."""
        inner = ("gauge", "final", "mine", "gap", "ahead")
        row = {name: value for name, value in asdict(self).items() if name not in inner}
        return row | {self.gauge.name.replace(" ", "_"): self.final, "told": self.told, "difference": self.gap.mean,
                      "ci_low": self.gap.low, "ci_high": self.gap.high, "units": self.gap.units}


def reaches(arms: Sequence[ArmSummary]) -> list[Reach]:
    """Compute-to-target of every arm, with the final metrics of the first arm and of `truncated` as targets."""
    targets = [arm for i, arm in enumerate(arms) if i == 0 or "truncated" in (arm.name, arm.text)]
    return _known(reach(arm, to) for to in targets for arm in arms if arm is not to)


def with_reverse(found: Sequence[Reach], arms: Sequence[ArmSummary]) -> list[Reach]:
    """`found`, with the reverse direction after each arm that reliably fails to reach its target: when the other arm
    reached the final metric of this one."""
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
    """Compute-to-target of `arm` for the final metric of `to`, runs paired by seed. None if the arms share no seed, or
    if every target is the worst possible value."""
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
    """True if the other arm, after the budget this one needed to match its final metric, was short of that metric by
    more than noise. The mean shortfall must exceed half the width of the paired interval of the final metrics (for a
    fraction, also that of two independent ones), and with several seeds Student's interval must lie above zero."""
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
    """One sentence per comparison; two arms without a reliable difference get only one."""
    said, untold = [], set()
    for each in found:
        pair = frozenset((each.arm, each.to))
        if each.told or each.gap.told or pair not in untold:
            said.append(sentence(each))
        if not each.told:
            untold.add(pair)
    return said


def sentence(reach: Reach) -> str:
    """`denoise reaches truncated's final loss (3.616) after 0.14 of its own training time, which is ...`, or
    `No reliable difference between ...`."""
    final = f"{reach.to}'s final {reach.gauge.name} ({reach.final:.3f})"
    if not reach.told:
        return _untold(reach, final)
    alone = " (1 seed: spread between seeds unknown)" if reach.num_seeds == 1 else ""
    if not reach.num_reached:
        return f"{reach.arm} does not reach {final}{alone}."
    seeds = "" if reach.num_reached == reach.num_seeds else f" in {reach.num_reached} of {reach.num_seeds} seeds"
    bound = "at most " if reach.early else ""
    shares = [f"{share:.2f} of {reach.to}'s {UNITS[unit]}" for unit, share in reach.shares.items()]
    return (f"{reach.arm} reaches {final}{seeds} after {bound}{reach.own:.2f} of its own training time, which is "
            f"{shares[0]}, {shares[1]} and {shares[2]}{alone}.")


def _untold(reach: Reach, final: str) -> str:
    """The sentence for a crossing that may be chance."""
    gap, seeds = reach.gap, "1 seed" if reach.num_seeds == 1 else f"{reach.num_seeds} seeds"
    spread = f", {min(gap.seeds):+.3f} to {max(gap.seeds):+.3f} by seed" if len(gap.seeds) > 1 else ""
    evidence = (f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] paired over {gap.examples}{spread}, "
                f"{seeds}")
    if gap.told:  # the curve reached the target at some time, by chance or before it got worse
        return f"{reach.arm} ends {'ahead of' if reach.better else 'behind'} {final}: {evidence}."
    why = f"; {', and '.join(gap.doubts)}" if tells_sign(gap.low, gap.high) and gap.doubts else ""
    return f"No reliable difference between {reach.arm} ({reach.mine:.3f}) and {final}: {evidence}{why}."
