"""Saturation of quality with depth: quality(t) = q_inf + z exp(-rate t), by least squares.

For a given rate the other two parameters are a linear fit (variable projection: Golub and Pereyra 1973). So a search
over the rate alone, on a grid and then between its neighbours, minimises over all three. The form is known from the
losses of language models, which saturate near the trained depth; for problems it is untested.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from looped.evaluation.depth_verdicts import ByDepth, Change, honestly_best

LEAST_DEPTHS = 4
"""Number of depths below which three parameters fit anything."""
EXPLAINED = 0.9
"""Fraction of the variance over depths that a fit must explain."""
FLAT = 0.01
"""Range of the means below which there is no gain to saturate."""
FASTEST = math.log(1000)
"""Largest rate times the gap of the first two depths: a thousandth of the gain is left at the second, and faster rates
cannot be distinguished."""
GRID, ROUNDS = 200, 6


@dataclass(frozen=True)
class Saturation:
    """The fit. `depth_95`: depth that reaches 95 % of the gain over the first measured depth. `residual`: root mean
    square over the depths, in units of the quality."""

    q_inf: float
    z: float
    rate: float
    depth_95: float
    residual: float

    def at(self, depth: float) -> float:
        return self.q_inf + self.z * math.exp(-self.rate * depth)


def fit_saturation(means: Mapping[int, float], *, higher_is_better: bool = True,
                   per_example: ByDepth | None = None) -> tuple[Saturation | None, str]:
    """The fit to mean quality by depth and a sentence about it, or None and the reason why the curve does not saturate.

    per_example: the values behind the means; if given, the paired 95 % interval of the change from the first depth to
    the best or to the deepest must exclude zero. A curve does not saturate if it has fewer than four depths, is flat,
    falls, has less than 90 % of its variance explained, reaches 95 % of its gain only beyond the deepest depth, or all
    of it by the second.
    """
    depths = np.array(sorted(means), dtype=np.float64)
    quality = np.array([means[int(depth)] for depth in depths])
    if len(depths) < LEAST_DEPTHS:
        return None, f"{len(depths)} depths are too few to fit three parameters; measure {LEAST_DEPTHS} or more"
    spread = float(quality.max() - quality.min())
    if spread < FLAT:
        return None, f"flat: the means lie within {spread:.3f}"
    if per_example is not None and (said := _no_change(per_example)):
        return None, said
    first, gap, deepest = depths[0], depths[1] - depths[0], depths[-1]
    rate = _best_rate(depths - first, quality, 0.1 / (deepest - first), FASTEST / gap)
    q_inf, z0, residual = _fit_at(rate, depths - first, quality)
    if (z0 < 0) != higher_is_better:
        return None, f"quality gets worse with depth, from {quality[0]:.2f} at {first:.0f} to {quality[-1]:.2f} at " \
                     f"{deepest:.0f} steps"
    explained = 1 - (residual / quality.std()) ** 2
    if explained < EXPLAINED:
        return None, f"an exponential explains {100 * max(explained, 0):.0f} % of the curve, less than " \
                     f"{100 * EXPLAINED:.0f} %"
    if rate > 0.99 * FASTEST / gap:
        return None, f"all of the gain comes between depth {first:.0f} and {depths[1]:.0f}, too fast to fit a rate"
    depth_95 = first + math.log(20) / rate
    if depth_95 > deepest:
        return None, f"not saturated at {deepest:.0f} steps: 95 % of the gain would be reached at {depth_95:.0f}"
    fit = Saturation(q_inf, z0 * math.exp(rate * first), rate, depth_95, residual)
    return fit, (f"{q_inf:.3f} {'-' if fit.z < 0 else '+'} {abs(fit.z):.3f} exp(-{rate:.3g} steps), residual "
                 f"{residual:.3f}; 95 % of the gain by {depth_95:.1f} steps")


def _no_change(per_example: ByDepth) -> str:
    """Sentence that depth has no significant effect; "" if it has one."""
    values = {depth: each.double().cpu() for depth, each in per_example.items()}
    start = values[min(values)]
    changes = [Change.of(end - start) for end in (honestly_best(values), values[max(values)])]
    if any(change.told for change in changes):
        return ""
    return (f"no significant gain or loss over depth {min(values)}: {changes[0].signed()} at the best depth, "
            f"{changes[1].signed()} at {max(values)}, paired over {len(start)}")


def _best_rate(steps: np.ndarray, quality: np.ndarray, low: float, high: float) -> float:
    """The rate of least residual: a log-spaced grid, then finer ones between the neighbours of the best."""
    for _ in range(ROUNDS):
        rates = np.geomspace(low, high, GRID)
        best = int(np.argmin([_fit_at(rate, steps, quality)[2] for rate in rates]))
        low, high = rates[max(best - 1, 0)], rates[min(best + 1, GRID - 1)]
    return float(rates[best])


def _fit_at(rate: float, steps: np.ndarray, quality: np.ndarray) -> tuple[float, float, float]:
    """(q_inf, z, root mean square residual) of the linear fit at a rate."""
    design = np.stack([np.ones_like(steps), np.exp(-rate * steps)], axis=1)
    solution, *_ = np.linalg.lstsq(design, quality, rcond=None)
    residual = quality - design @ solution
    return float(solution[0]), float(solution[1]), float(np.sqrt(np.mean(residual**2)))
