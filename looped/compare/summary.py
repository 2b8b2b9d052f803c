"""From the measured runs to figures an arm: means and spreads over seeds, paired differences, time to reach a loss."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from jaxtyping import Float
from torch import Tensor

from looped.compare.measure import COSTS, Measured
from looped.evaluation.rows import confidence_interval

BUDGETS = ("seconds", "tokens", "layer_forwards")
"""What a curve of held-out loss can be drawn against."""


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: its mean, and its standard deviation where there are several."""

    mean: float
    sd: float
    num: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of one figure a seed."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values))


@dataclass(frozen=True)
class Difference:
    """How far one arm is above another (`to`) in nats a token: 95 % interval over sequences, spread over seeds."""

    to: str
    mean: float
    ci_low: float
    ci_high: float
    sd: float
    num_seeds: int


@dataclass(frozen=True)
class Reach:
    """When `arm` had the final loss of the arm `to`: as a share of its own training, and of what `to` spent in each of
    `BUDGETS`; means over the seeds that got there. `early`: some were there at their first evaluation already."""

    arm: str
    to: str
    loss: float
    num_seeds: int
    num_reached: int
    own: float | None
    shares: dict[str, float]
    early: bool


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its finished seeds. `by_depth`: nats a token; `main`: as a next-token predictor."""

    name: str
    runs: list[Measured]
    main: Spread
    by_depth: dict[int, Spread]
    costs: dict[str, Spread]
    difference: Difference | None

    def over_seeds(self, figure: Callable[[Measured], float | None]) -> Spread | None:
        """A figure of every run; None where a run has none."""
        values = [figure(run) for run in self.runs]
        return None if None in values else spread(values)

    @property
    def judged_depths(self) -> list[int]:
        """Depths at which a judge has read the samples of every run."""
        return sorted(set.intersection(*(set(run.losses.get("judged_behind_twin", ())) for run in self.runs)))

    def behind(self, metric: str, depth: int) -> tuple[float, float, float]:
        """Mean and 95 % interval over prompts of a paired difference, averaged over seeds."""
        each = torch.stack([run.losses[metric][depth] for run in self.runs]).mean(0)
        return each.mean().item(), *confidence_interval(each)


def summarise_arms(measured: Sequence[Measured]) -> list[ArmSummary]:
    """Arms in their order; differences are to the first."""
    groups: dict[str, list[Measured]] = {}
    for run in measured:
        groups.setdefault(run.place.arm.name, []).append(run)
    first = next(iter(groups.values()), [])
    return [_summarise(name, runs, first) for name, runs in groups.items()]


def _summarise(name: str, runs: list[Measured], first: list[Measured]) -> ArmSummary:
    depths = sorted(set.intersection(*(set(run.losses["nats_per_token"]) for run in runs)))
    return ArmSummary(
        name, runs, main=spread([run.main.mean().item() for run in runs]),
        by_depth={depth: spread([run.losses["nats_per_token"][depth].mean().item() for run in runs])
                  for depth in depths},
        costs={cost: spread([run.costs[cost] for run in runs]) for cost in COSTS},
        difference=None if runs is first else difference(runs, first))


def difference(runs: Sequence[Measured], others: Sequence[Measured]) -> Difference | None:
    """Of the next-token losses, sequence by sequence and seed by seed; None where no seed is in both."""
    pairs = _pairs(runs, others)
    if not pairs:
        return None
    each: Float[Tensor, "seeds num"] = torch.stack([run.main - other.main for run, other in pairs])
    low, high = confidence_interval(each.mean(0))
    over = spread(each.mean(1).tolist())
    return Difference(others[0].place.arm.name, over.mean, low, high, over.sd, over.num)


def _pairs(runs: Sequence[Measured], others: Sequence[Measured]) -> list[tuple[Measured, Measured]]:
    by_seed = {other.place.seed: other for other in others}
    return [(run, by_seed[run.place.seed]) for run in runs if run.place.seed in by_seed]


def reaches(arms: Sequence[ArmSummary]) -> list[Reach]:
    """Of every arm, to the first one and to `truncated`."""
    targets = [arm for i, arm in enumerate(arms) if i == 0 or arm.name == "truncated"]
    found = [reach(arm, to) for to in targets for arm in arms if arm is not to]
    return [each for each in found if each is not None]


def reach(arm: ArmSummary, to: ArmSummary) -> Reach | None:
    """When each run of an arm had the final loss of the other arm's run of the same seed."""
    pairs = _pairs(arm.runs, to.runs)
    if not pairs:
        return None
    finals = [other.curve[-1]["next_token"] for _, other in pairs]
    points = [crossing(run.curve, final) for (run, _), final in zip(pairs, finals, strict=True)]
    there = [(run, other, point) for (run, other), point in zip(pairs, points, strict=True) if point is not None]
    shares = {unit: fmean(point[unit] / other.curve[-1][unit] for _, other, point in there)
              for unit in BUDGETS} if there else {}
    return Reach(arm.name, to.name, fmean(finals), len(pairs), len(there),
                 fmean(point["seconds"] / run.curve[-1]["seconds"] for run, _, point in there) if there else None,
                 shares, any(point["early"] for _, _, point in there))


def crossing(curve: Sequence[dict], loss: float) -> dict | None:
    """What had been spent when a curve first came down to `loss`: straight lines between evaluations, nothing before
    the first of them (`early`). None where it never did."""
    for i, line in enumerate(curve):
        if line["next_token"] > loss:
            continue
        if i == 0:
            return {unit: line[unit] for unit in BUDGETS} | {"early": True}
        before = curve[i - 1]
        part = (before["next_token"] - loss) / (before["next_token"] - line["next_token"])
        return {unit: before[unit] + part * (line[unit] - before[unit]) for unit in BUDGETS} | {"early": False}
    return None
