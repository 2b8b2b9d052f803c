"""From the measured runs to figures an arm: means and spreads over seeds, paired differences."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from statistics import fmean, stdev
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from looped.compare.measure import MeanMeasured, Measured
from looped.evaluation.rows import LEAST, confidence_interval, student_interval, tells_sign
from looped.training.monitor import COSTS

Run = TypeVar("Run", bound=Measured)
Each = Callable[[Run], Float[Tensor, "num"]]
"""A figure of every held-out sequence or problem of a run."""
FOLLOWED: Each[Measured] = attrgetter("followed")


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
    """The distance of one arm above another (`to`): 95 % interval over sequences or problems, spread over seeds."""

    to: str
    mean: float
    ci_low: float
    ci_high: float
    sd: float
    num_seeds: int


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its finished seeds."""

    name: str
    runs: list[Measured]

    @property
    def text(self) -> str:
        """The arm in full."""
        return self.runs[0].place.arm.text

    @property
    def costs(self) -> dict[str, Spread]:
        """What a run of it took."""
        return {cost: spread([run.costs[cost] for run in self.runs]) for cost in COSTS}

    def seeds_by_depth(self) -> dict[int, list[float]]:
        """Depth -> the figure of each seed, after training."""
        raise NotImplementedError

    def rows(self) -> list[dict[str, Any]]:
        """Rows besides those of its runs."""
        raise NotImplementedError


@dataclass(frozen=True)
class MeanSummary(ArmSummary):
    """One arm with a figure that its curves follow (`main`; its `difference` is to the first arm) and one by depth."""

    runs: list[MeanMeasured]
    main: Spread
    by_depth: dict[int, Spread]
    difference: Difference | None

    def seeds_by_depth(self) -> dict[int, list[float]]:
        return {depth: [run.by_depth[depth] for run in self.runs] for depth in self.by_depth}

    def rows(self) -> list[dict[str, Any]]:
        return [{"kind": "difference", **asdict(self.difference)}] if self.difference is not None else []


def summarise_means(measured: Sequence[MeanMeasured], kind: type[MeanSummary] = MeanSummary) -> list[MeanSummary]:
    """Arms in their order; differences are to the first."""
    groups = by_arm(measured)
    first = next(iter(groups.values()), [])
    return [kind(name, runs, spread([run.followed.mean().item() for run in runs]),
                 {depth: spread([run.by_depth[depth] for run in runs])
                  for depth in sorted(set.intersection(*(set(run.by_depth) for run in runs)))},
                 None if runs is first else difference(runs, first, FOLLOWED, FOLLOWED))
            for name, runs in groups.items()]


def by_arm(measured: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each arm; arms in their order."""
    groups: dict[str, list[Run]] = {}
    for run in measured:
        groups.setdefault(run.place.arm.name, []).append(run)
    return groups


def pairs(runs: Sequence[Run], others: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Runs of two arms with the same seed."""
    by_seed = {other.place.seed: other for other in others}
    return [(run, by_seed[run.place.seed]) for run in runs if run.place.seed in by_seed]


@dataclass(frozen=True)
class Gap:
    """The difference between two arms at their ends, in the metric that their curves follow: paired over `num`
    sequences or problems (the mean over seeds, with a 95 % interval), and of each seed."""

    mean: float
    low: float
    high: float
    num: int
    seeds: tuple[float, ...]

    @property
    def told(self) -> bool:
        """True if it is more than noise: the interval over enough sequences leaves out zero, and so does Student's over
        the seeds, where there are several."""
        over_seeds = len(self.seeds) == 1 or tells_sign(*student_interval(self.seeds))
        return self.num >= LEAST and tells_sign(self.low, self.high) and over_seeds


def gap(runs: Sequence[Run], others: Sequence[Run]) -> Gap | None:
    """Of the figures that the curves follow, after training; None where no seed is in both."""
    paired = pairs(runs, others)
    if not paired:
        return None
    each: Float[Tensor, "seeds num"] = torch.stack([run.followed - other.followed for run, other in paired])
    return Gap(each.mean().item(), *confidence_interval(each.mean(0)), each.shape[1], tuple(each.mean(1).tolist()))


def difference(runs: Sequence[Run], others: Sequence[Run], mine: Each[Run], theirs: Each[Run]) -> Difference | None:
    """Of a figure, sequence by sequence (or problem by problem) and seed by seed; None where no seed is in both."""
    paired = pairs(runs, others)
    if not paired:
        return None
    each: Float[Tensor, "seeds num"] = torch.stack([mine(run) - theirs(other) for run, other in paired])
    low, high = confidence_interval(each.mean(0))
    over = spread(each.mean(1).tolist())
    return Difference(others[0].place.arm.name, over.mean, low, high, over.sd, over.num)
