"""One figure with its interval: the form in which every evaluation gives its results.

{metric, mean, ci_low, ci_high, n, depth, difficulty, sigma, temperature, by, trajectories, seconds, layer_forwards,
evaluations, peak_bytes}, so that a table, a JSONL file and a plot of any two runs need no translation.
"""

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from looped.rng import generator


@dataclass(frozen=True)
class Row:
    """One figure of a sweep. `sigma` is set for figures by noise level, `depth` for figures by depth, `difficulty` for
    those of problems; `temperature` where it was chosen; `by` names a model that the figure depends on besides the
    run's: judge, twin or encoder; `trajectories` the solver runs that a figure is a mean over. `layer_forwards` and
    `evaluations` (NFE) are those of one sequence, as it was run (`inference_cost`). Without an interval both ends are
    None."""

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
    trajectories: int | None = None
    seconds: float | None = None
    layer_forwards: float | None = None
    evaluations: float | None = None
    peak_bytes: int | None = None

    def as_dict(self) -> dict:
        """Only the fields that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def summarise(metric: str, values: Float[Tensor, "num"], **fields) -> Row:
    """Mean and 95 % interval of one figure a sequence."""
    low, high = confidence_interval(values)
    return Row(metric, values.mean().item(), low, high, len(values), **fields)


def confidence_interval(values: Float[Tensor, "num"], *, num_resamples: int = 1000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over sequences; the same for the same values."""
    values = values.double()
    picks = torch.randint(len(values), (num_resamples, len(values)), generator=generator("bootstrap", len(values)))
    means = values[picks].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
