"""One metric value with its confidence interval: the row format of every evaluation result.

{metric, mean, ci_low, ci_high, n, clusters, depth, difficulty, sigma, temperature, by, twin, trajectories, seconds,
layer_forwards, evaluations, peak_bytes}, so that a table, a JSONL file and a plot of any two runs need no translation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from looped.evaluation.intervals import Clusters, confidence_interval
from looped.tensor_types import Bool, Float


@dataclass(frozen=True)
class Row:
    """One figure of a sweep. Optional fields: `sigma` for figures by noise level, `depth` for figures by depth,
    `difficulty` for those of problems, `temperature` if it was chosen; `by` names what else the figure depends on
    (judge, encoder, features, exit or block), `twin` the baseline it is compared with; `trajectories` is the number of
    solver runs it averages. `layer_forwards` and `evaluations` (NFE) are per sequence, as it was run
    (`looped.inference.cost`). A figure without an interval has None at both ends; `clusters` is the number of documents
    that an interval is over, None if it takes the values as independent."""

    metric: str
    mean: float
    ci_low: float | None
    ci_high: float | None
    n: int
    clusters: int | None = None
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


def example_lines(metric: str, by_depth: Mapping[int, Float[Tensor, "num"] | Bool[Tensor, "num"]],
                  **where: int | str | None) -> list[dict[str, Any]]:
    """Values of single sequences as JSON lines. `where`: difficulty, trajectories, judge (`by`) or `twin`, if set."""
    where = {name: value for name, value in where.items() if value is not None}
    return [{"metric": metric, **where, "depth": depth, "values": values.double().tolist()}
            for depth, values in by_depth.items()]


def summarise(metric: str, values: Float[Tensor, "num"], *, clusters: Clusters | None = None, **fields: Any) -> Row:
    """Mean and 95 % interval of one value per sequence; a single value has no interval."""
    low, high = confidence_interval(values, clusters) if len(values) > 1 else (None, None)
    num = clusters.num if clusters is not None and clusters.suffice else None
    return Row(metric, values.mean().item(), low, high, len(values), clusters=num, **fields)
