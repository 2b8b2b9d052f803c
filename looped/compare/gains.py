"""Gain of each arm over the baseline against the compute it was trained with: a table and a plot.

The gain is in the metric that the comparison follows, paired by held-out item and seed; the compute is counted in FLOPs
of forward and backward passes, as a multiple of the baseline's. Weights are listed beside it, since a gain at equal
compute may be a gain of weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from looped.compare.measure import Measured
from looped.compare.plan import Plan
from looped.compare.plots import finish, picture
from looped.compare.summary import ArmSummary, gap
from looped.cost.counts import count
from looped.data.from_config import source_of
from looped.evaluation.plots import colours, markers, new_figure
from looped.reports.sections import Figure, Heading, Prose, Section, Table

MANY = 10
"""Multiples of compute from which the axis is logarithmic."""
SHORT = 28
"""Letters of the longest name that stands beside its point; if one is longer, all are in a legend."""
NEAR = 0.06
"""Share of the axes' height within which two names at nearly the same compute would overlap."""


@dataclass(frozen=True)
class Gain:
    """An arm beside the baseline. weights, flops: multiples of the baseline's parameters and training FLOPs; gain, low,
    high: difference in the followed metric, positive if the arm is better, with its 95 % interval over held-out items,
    None for the baseline itself and for an arm without a common seed; by_seed: the difference with each common seed, of
    which `gain` is the mean; told: the difference is more than noise; units: those that the interval is over."""

    arm: str
    weights: float
    flops: float
    gain: float | None
    low: float | None
    high: float | None
    told: bool
    by_seed: tuple[float, ...] = ()
    units: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row of compare.jsonl."""
        return {"kind": "gain", **asdict(self)}


def baseline_of(arms: Sequence[ArmSummary]) -> ArmSummary:
    """The arm that the others are compared with: the first one without a loop, or else the first one."""
    return next((arm for arm in arms if _config(arm).rule.baseline), arms[0])


def gains(arms: Sequence[ArmSummary]) -> list[Gain]:
    """One for each arm, in their order."""
    base = baseline_of(arms)
    costs = {arm.name: _cost(arm) for arm in arms}  # each counted once, which takes seconds
    weights, flops = costs[base.name]
    return [_gain(arm, base, costs[arm.name][0] / weights, costs[arm.name][1] / flops) for arm in arms]


def _gain(arm: ArmSummary, base: ArmSummary, weights: float, flops: float) -> Gain:
    """weights, flops: multiples of those of `base`."""
    found = None if arm is base else gap(arm.runs, base.runs)
    cost = (arm.name, weights, flops)
    if found is None:
        return Gain(*cost, None, None, None, told=False)
    if arm.runs[0].gauge.higher_is_better:
        return Gain(*cost, found.mean, found.low, found.high, found.told, found.seeds, found.units)
    by_seed = tuple(-each for each in found.seeds)
    return Gain(*cost, -found.mean, -found.high, -found.low, found.told, by_seed, found.units)


def budget_curves(arms: Sequence[ArmSummary], found: Sequence[Gain]) -> dict[str, list[Gain]]:
    """Gains of arms that differ in nothing but their budget, in order of compute, by the name of the first of them: the
    curve of a rule over training, or a single point."""
    curves: list[tuple[Any, list[Gain]]] = []
    for arm, each in zip(arms, found, strict=True):
        config = _config(arm).replace(**{"training.budget": 1})
        curve = next((curve for other, curve in curves if other == config), None)
        if curve is None:
            curves.append((config, [each]))
        else:
            curve.append(each)
    return {curve[0].arm: sorted(curve, key=lambda each: each.flops) for _, curve in curves}


def _config(arm: ArmSummary) -> Any:
    return arm.runs[0].place.arm.config


def _cost(arm: ArmSummary) -> tuple[float, float]:
    """(parameters, FLOPs of training, forward and backward)."""
    config, steps = _config(arm), arm.costs["step"].mean
    vocab_size = source_of(config).vocab_size(config)
    counts, more = count(config, vocab_size), config.rule.one_more(config)
    flops = counts.step_flops
    if more:  # counted for a solver that runs to its limit: what the measured steps have run less
        deeper = count(config.replace(**more), vocab_size)
        layer = (deeper.step_flops - flops) / (deeper.layer_forwards - counts.layer_forwards)
        measured = arm.costs["layer_forwards"].mean / (steps * config.training.batch_size)
        flops += layer * (measured - counts.layer_forwards)
    return counts.parameters, flops * steps


def gain_sections(arms: Sequence[ArmSummary], plan: Plan, found: Sequence[Gain]) -> list[Section]:
    """The table and the plot; none without gains."""
    if not found:
        return []
    base, first = baseline_of(arms), arms[0].runs[0]
    gauge = first.gauge
    return [Heading("Gain and training compute"),
            Prose(f"Gain over {base.name} in held-out {gauge.name}{gauge.remark}, positive if better, with its 95 % "
                  f"interval over {first.units}, which leaves out the spread between seeds; training compute is "
                  f"FLOPs of forward and backward passes, counted. A gain in brackets is within noise."),
            _table(found, base.name), _figure(found, budget_curves(arms, found), base.name, first, plan)]


def _table(found: Sequence[Gain], base: str) -> Table:
    best = max((each.gain for each in found if each.gain is not None), default=0.0)
    header = ["arm", "weights", "training FLOPs", f"gain over {base}", "of the largest gain", "by seed"]
    rows = [[each.arm, multiple_cell(each.weights), multiple_cell(each.flops), gain_cell(each.as_dict()),
             _share(each, best), ", ".join(f"{seed:+.3f}" for seed in each.by_seed) or "-"] for each in found]
    num = len(header) if any(len(each.by_seed) > 1 for each in found) else len(header) - 1
    return Table(header[:num], [row[:num] for row in rows])


def multiple_cell(value: float) -> str:
    """`1.27 x`: a multiple of the baseline's figure."""
    return f"{value:.2f} x"


def gain_cell(row: Mapping[str, Any]) -> str:
    """The gain of a row of kind `gain`, with its interval, in brackets if it is within noise."""
    if row.get("gain") is None:
        return "-"
    text = f"{row['gain']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
    return text if row["told"] else f"({text})"


def _share(each: Gain, best: float) -> str:
    return f"{100 * each.gain / best:.0f} %" if each.gain is not None and best > 0 else "-"


def _figure(found: Sequence[Gain], curves: Mapping[str, Sequence[Gain]], base: str, first: Measured, plan: Plan
            ) -> Figure:
    figure, axes = new_figure()
    axes.axhline(0, color="0.5", linewidth=0.8, linestyle=":")
    names = [arm if curve[0].weights == 1 else f"{arm} ({curve[0].weights:.2g} x weights)"
             for arm, curve in curves.items()]
    beside = max(map(len, names)) <= SHORT
    for curve, name, colour, marker in zip(curves.values(), names, colours(len(curves)), markers(len(curves)),
                                           strict=True):
        values = [each.gain or 0.0 for each in curve]
        bars = [[max(value - (each.low or 0.0), 0) for each, value in zip(curve, values, strict=True)],
                [max((each.high or 0.0) - value, 0) for each, value in zip(curve, values, strict=True)]]
        axes.errorbar([each.flops for each in curve], values, bars, fmt=f"{marker}-", color=colour, markersize=6,
                      capsize=3, linewidth=1, label=None if beside else name)
    if max(each.flops for each in found) / min(each.flops for each in found) > MANY:
        axes.set_xscale("log")
    else:
        axes.set_xlim(0, math.ceil(max(each.flops for each in found)) + 0.5)
    if beside:
        _names_beside(axes, [curve[-1] for curve in curves.values()], names)
    axes.set_xlabel(f"training FLOPs, multiple of {base}")
    axes.set_ylabel(f"gain over {base}: {first.gauge.axis}")
    finish(figure, axes, path := picture(plan.out, "gain"))
    lines = "; a line joins arms that differ in their budget alone" if len(curves) < len(found) else ""
    caption = f"Gain over {base} against training compute; bars are 95 % intervals over {first.units}{lines}."
    return Figure(path, caption, "Gain of each arm against its training compute", wide=True)


def _names_beside(axes: Any, found: Sequence[Gain], names: Sequence[str]) -> None:
    """Write each name on the right of its point, on the left of it below another one's name, or below both."""
    apart = NEAR * abs(axes.get_ylim()[1] - axes.get_ylim()[0])
    written: dict[bool, list[tuple[float, float]]] = {False: [], True: []}  # left? -> (FLOPs, height) of its names
    for each, name in sorted(zip(found, names, strict=True), key=lambda pair: -(pair[0].gain or 0.0)):
        place = each.gain or 0.0
        lowest = {left: min((height for flops, height in side if abs(math.log(flops / each.flops)) < math.log(1.2)),
                            default=math.inf) for left, side in written.items()}
        left = lowest[False] - place < apart
        if left:
            place = min(place, lowest[True] - apart)
        written[left].append((each.flops, place))
        axes.annotate(name, (each.flops, place), xytext=(-8 if left else 8, 0), textcoords="offset points",
                      ha="right" if left else "left", va="center", fontsize=8)
