"""One metric value with its confidence interval: the row format of every evaluation result.

{metric, mean, ci_low, ci_high, n, depth, difficulty, sigma, temperature, by, twin, trajectories, seconds,
layer_forwards, evaluations, peak_bytes}, so that a table, a JSONL file and a plot of any two runs need no translation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean, stdev
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from looped.rng import generator
from looped.tensor_types import Bool, Float, Int


@dataclass(frozen=True)
class Row:
    """One figure of a sweep. Optional fields: `sigma` for figures by noise level, `depth` for figures by depth,
    `difficulty` for those of problems, `temperature` if it was chosen; `by` names what else the figure depends on
    (judge, encoder, features, exit or block), `twin` the baseline it is compared with; `trajectories` is the number of
    solver runs it averages. `layer_forwards` and `evaluations` (NFE) are per sequence, as it was run
    (`looped.inference.cost`). A figure without an interval has None at both ends."""

    metric: str
    mean: float
    ci_low: float | None
    ci_high: float | None
    n: int
    depth: int | None = None
    difficulty: int | None = None
    sigma: float | None = None
    temperature: float | None = None
    by: str | None = None
    twin: str | None = None
    trajectories: int | None = None
    seconds: float | None = None
    layer_forwards: float | None = None
    evaluations: float | None = None
    peak_bytes: int | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends of the interval; the figure itself if it has none."""
        return (self.mean, self.mean) if self.ci_low is None or self.ci_high is None else (self.ci_low, self.ci_high)

    def shown(self, form: str = ".3f", ends: str = ".3f") -> str:
        """`0.912 [0.870, 0.950]`, the figure with its interval, if it has one."""
        interval = "" if self.ci_low is None else f" [{self.ci_low:{ends}}, {self.ci_high:{ends}}]"
        return f"{self.mean:{form}}{interval}"

    def as_dict(self) -> dict[str, Any]:
        """Only the fields that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def row_of(line: Mapping[str, Any]) -> Row:
    """The row of a JSON line; unknown keys are left out."""
    return Row(**{field.name: line.get(field.name) for field in fields(Row)})


@runtime_checkable
class Keep(Protocol):
    """Callback for each part of an evaluation as soon as it is finished: rows, `example_lines`, and samples of text."""

    def __call__(self, rows: Sequence[Row] = (), examples: Sequence[dict[str, Any]] = (),
                 samples: Sequence[dict[str, Any]] = ()) -> None: ...


def keep_nothing(rows: Sequence[Row] = (), examples: Sequence[dict[str, Any]] = (),
                 samples: Sequence[dict[str, Any]] = ()) -> None:
    """The `Keep` that stores nothing, for evaluations that are only returned."""


Clusters = Int[Tensor, "num"] | None
"""The cluster of each value, any number: for a sequence, that of its document. None: the values are independent."""


def example_lines(metric: str, by_depth: Mapping[int, Float[Tensor, "num"] | Bool[Tensor, "num"]],
                  **where: int | str | None) -> list[dict[str, Any]]:
    """Values of single sequences as JSON lines. `where`: difficulty, trajectories, judge (`by`) or `twin`, if set."""
    where = {name: value for name, value in where.items() if value is not None}
    return [{"metric": metric, **where, "depth": depth, "values": values.double().tolist()}
            for depth, values in by_depth.items()]


def summarise(metric: str, values: Float[Tensor, "num"], *, clusters: Clusters = None, **fields: Any) -> Row:
    """Mean and 95 % interval of one value per sequence; a single value has no interval."""
    low, high = confidence_interval(values, clusters) if len(values) > 1 else (None, None)
    return Row(metric, values.mean().item(), low, high, len(values), **fields)


LEAST = 6
"""Number of values (or of clusters of them) below which no interval determines a sign: five agree in sign by chance in
1 of 16 cases."""

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % points of Student's t with 1, 2, ... degrees of freedom; beyond them 2.12, that of 16, is wide enough."""


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's t 95 % interval of the mean of a few values, such as seeds; infinite for a single value."""
    if len(values) < 2:
        return -math.inf, math.inf
    free = len(values) - 1
    reach = (STUDENT[free - 1] if free <= len(STUDENT) else 2.12) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - reach, fmean(values) + reach


def tells_sign(low: float, high: float) -> bool:
    """True if an interval excludes zero."""
    return low > 0 or high < 0


def over_clusters(clusters: Clusters) -> bool:
    """True if intervals are over clusters: with fewer than `LEAST` of them they would say nothing, and are over values.
    """
    return clusters is not None and len(clusters.unique()) >= LEAST


def confidence_interval(values: Float[Tensor, "num"], clusters: Clusters = None, *,
                        num_resamples: int = 1000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; deterministic for given values.

    Values of one cluster are not independent, so whole clusters are drawn, each with all its values (the cluster
    bootstrap; the clustered standard error of Miller, arXiv 2411.00640, is the same as a formula). Without clusters, or
    with fewer than `LEAST`, values are drawn.
    """
    values = values.double()
    sums, counts = values, torch.ones_like(values)
    if clusters is not None and over_clusters(clusters):
        found, place = clusters.to(values.device).unique(return_inverse=True)
        sums, counts = (each.new_zeros(len(found)).index_add(0, place, each) for each in (sums, counts))
    picks = torch.randint(len(sums), (num_resamples, len(sums)), generator=generator("bootstrap", len(sums)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
