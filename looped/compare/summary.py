"""Summary of each arm from its measured runs: means and spreads over seeds, and paired differences between arms."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from statistics import fmean, stdev
from typing import Any, TypeVar

import torch
from torch import Tensor

from looped.compare.measure import MeanMeasured, Measured
from looped.evaluation.intervals import LEAST, confidence_interval, student_interval, tells_sign
from looped.tensor_types import Float
from looped.training.logs import COSTS

Run = TypeVar("Run", bound=Measured)
Each = Callable[[Run], Float[Tensor, "num"]]
"""Function from a run to one value per held-out sequence, problem or image."""
FOLLOWED: Each[Measured] = attrgetter("followed")


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over `num` seeds; `sd` is NaN for one seed."""

    mean: float
    sd: float
    num: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of one value per seed."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values))


@dataclass(frozen=True)
class Difference:
    """One arm minus another (`to`): mean, 95 % interval over `units`, standard deviation over seeds."""

    to: str
    mean: float
    ci_low: float
    ci_high: float
    units: str
    sd: float
    num_seeds: int


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its finished seeds."""

    name: str
    runs: list[Measured]

    @property
    def text(self) -> str:
        """The full text of the arm."""
        return self.runs[0].place.arm.text

    @property
    def costs(self) -> dict[str, Spread]:
        """Training cost -> spread over the runs."""
        return {cost: spread([run.costs[cost] for run in self.runs]) for cost in COSTS}

    def seeds_by_depth(self) -> dict[int, list[float]]:
        """Depth -> one value per seed, after training."""
        raise NotImplementedError

    def rows(self) -> list[dict[str, Any]]:
        """The rows of compare.jsonl that belong to the arm and not to a single run."""
        raise NotImplementedError


@dataclass(frozen=True)
class MeanSummary(ArmSummary):
    """One arm with a metric `by_depth` and `main`, the final metric of its curves; `difference`: of `main` to the first
    arm."""

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
    """The difference between two arms in the final metric of their curves, paired over `examples`: the mean over seeds
    with its 95 % interval over `num` `units`, such as documents, and one value per seed."""

    mean: float
    low: float
    high: float
    num: int
    units: str
    examples: str
    seeds: tuple[float, ...]

    @property
    def told(self) -> bool:
        """True if the difference is more than noise: there are enough units, their interval excludes zero, and with
        several seeds so does Student's interval over the seeds."""
        return tells_sign(self.low, self.high) and not self.doubts

    @property
    def doubts(self) -> list[str]:
        """The reasons, as clauses, why an interval over units alone does not tell the difference from noise."""
        found = [] if self.num >= LEAST else [f"fewer than {LEAST} tell no sign"]
        if len(self.seeds) > 1 and not tells_sign(*(ends := student_interval(self.seeds))):
            found.append(f"the 95 % interval over seeds, [{ends[0]:+.3f}, {ends[1]:+.3f}], includes 0")
        return found


def gap(runs: Sequence[Run], others: Sequence[Run]) -> Gap | None:
    """The final difference in the metric of the curves; None if the arms share no seed."""
    paired = pairs(runs, others)
    if not paired:
        return None
    each: Float[Tensor, "seeds num"] = torch.stack([run.followed - other.followed for run, other in paired])
    clusters = (first := paired[0][0]).clusters
    num = clusters.num if clusters is not None and clusters.suffice else each.shape[1]
    return Gap(each.mean().item(), *confidence_interval(each.mean(0), clusters), num, first.units, first.examples,
               tuple(each.mean(1).tolist()))


def difference(runs: Sequence[Run], others: Sequence[Run], mine: Each[Run], theirs: Each[Run]) -> Difference | None:
    """Difference of two arms, paired by sequence (or problem) and seed; None if the arms share no seed."""
    paired = pairs(runs, others)
    if not paired:
        return None
    each: Float[Tensor, "seeds num"] = torch.stack([mine(run) - theirs(other) for run, other in paired])
    low, high = confidence_interval(each.mean(0), (first := paired[0][0]).clusters)
    over = spread(each.mean(1).tolist())
    return Difference(others[0].place.arm.name, over.mean, low, high, first.units, over.sd, over.num)
