"""Verdict on a curve of quality over depth (share solved, or a loss), in one word and one sentence.

    never       at its best depth it is not distinguishable from chance: the interval of its mean reaches it
    cycles      more than `CYCLING` of the problems cycle between two or more answers: in the second half of the steps
                the answer changes, and repeats at least three times with one period
    overthinks  it loses more than `LOST` from its best depth to the deepest
    drifts      it loses more than `HELD`, but not more than `LOST`
    improves    it gains more than `HELD` from the deepest trained depth (the first measured one, if none is known) to
                the deepest measured
    settles     none of these

The first that holds is the verdict. A loss or a gain counts only where the 95 % bootstrap interval of its mean, paired
over problems (of text over documents), excludes zero. Picking the best depth out of noise would look like a loss after
it; so each half of the problems uses the depth that is best for the other half.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from looped.evaluation.intervals import Clusters, confidence_interval, tells_sign
from looped.tensor_types import Float, Int, Shaped

HELD, LOST = 0.01, 0.05
"""In share of problems solved, or nats: up to the first a curve settles, beyond the second it overthinks."""
CYCLING = 0.05
"""Fraction of problems with cycling answers beyond which the verdict is `cycles`."""
LEAST_TAIL, ROUNDS = 6, 3
"""Least number of steps to search for a period in, and how often the period must fit into them."""

Name = Literal["never", "cycles", "overthinks", "drifts", "improves", "settles"]
ByDepth = Mapping[int, Shaped[Tensor, "num"]]
Answers = Int[Tensor, "steps watched cells"]


@dataclass(frozen=True)
class Measure:
    """The metric of a curve: `unit` follows a figure in a sentence; `chance` is the figure of guessing, if known."""

    unit: str
    over: str
    higher_is_better: bool
    chance: float | None = None


SOLVED = Measure("solved", "problems", True, 0.0)
NATS = Measure("nats", "sequences", False)


@dataclass(frozen=True)
class Change:
    """A paired difference, positive where quality rises, with its 95 % interval."""

    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Float[Tensor, "num"], clusters: Clusters | None = None) -> "Change":
        return Change(values.mean().item(), *confidence_interval(values, clusters))

    def falls_by(self, amount: float) -> bool:
        return self.mean < -amount and self.high < 0

    def rises_by(self, amount: float) -> bool:
        return self.mean > amount and self.low > 0

    @property
    def told(self) -> bool:
        """True if the interval excludes zero."""
        return tells_sign(self.low, self.high)

    def signed(self) -> str:
        """Text with signs, as `-0.01 [-0.03, +0.01]`."""
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    def size(self) -> str:
        """Text without the sign, as `0.27 [0.21, 0.33]`."""
        low, high = (self.low, self.high) if self.mean >= 0 else (-self.high, -self.low)
        return f"{abs(self.mean):.2f} [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Verdict:
    """`name` in one word, `sentence` with the figures that decide it. `from_best`: change from the best depth to the
    deepest; `from_trained`: change from the trained depth (or the first) to the deepest."""

    name: Name
    sentence: str
    best: int
    deepest: int
    from_best: Change
    from_trained: Change


def verdict(by_depth: ByDepth, measure: Measure = SOLVED, *, trained: int | None = None,
            answers: Answers | None = None, clusters: Clusters | None = None) -> Verdict:
    """The verdict on one curve, by the rule above. by_depth: depth -> one value per problem.

    trained: the deepest trained depth. answers: of some or all problems at consecutive depths, constant in cells that
    are not scored; without them, right and wrong at consecutive depths count as two answers, if `by_depth` has enough.
    clusters: the document of each sequence of text.
    """
    sign = 1.0 if measure.higher_is_better else -1.0
    quality = {depth: sign * by_depth[depth].cpu().double() for depth in sorted(by_depth)}
    first, deepest = min(quality), max(quality)
    best = best_depth(quality)
    anchor = max((depth for depth in quality if trained is not None and depth <= trained), default=first)
    at_best = honestly_best(quality, clusters)
    from_best = Change.of(quality[deepest] - at_best, clusters)
    from_trained = Change.of(quality[deepest] - quality[anchor], clusters)
    curve = _Curve({depth: sign * values.mean().item() for depth, values in quality.items()}, measure,
                   len(quality[first]))
    if answers is None and measure is SOLVED:
        answers = flips(quality)
    periods = None if answers is None else periods_of(answers)
    name: Name
    if measure.chance is not None and confidence_interval(at_best, clusters)[0] <= sign * measure.chance:
        name, said = "never", curve.never(best)
    elif periods is not None and confidence_interval((periods > 1).double())[0] > CYCLING:
        name, said = "cycles", curve.cycles(periods, best, deepest)
    elif from_best.falls_by(HELD):
        name = "overthinks" if from_best.falls_by(LOST) else "drifts"
        said = curve.moves("falls", best, deepest, from_best)
    elif from_trained.rises_by(HELD):
        name, said = "improves", curve.moves("rises", anchor, deepest, from_trained)
    else:
        name, said = "settles", curve.settles(best, deepest, from_best)
    return Verdict(name, f"{name}: {said}", best, deepest, from_best, from_trained)


def best_depth(quality: ByDepth) -> int:
    """Depth with the highest mean; ties go to the shallowest."""
    means = {depth: quality[depth].double().mean().item() for depth in sorted(quality)}
    return max(means, key=means.__getitem__)


def honestly_best(quality: ByDepth, clusters: Clusters | None = None) -> Float[Tensor, "num"]:
    """Each problem's value at the depth that is best for the other half of the problems (even or odd; of whole
    documents, if there are clusters), so that the mean has no bias from picking the best of several noisy depths."""
    chosen = torch.empty_like(next(iter(quality.values())))
    second = torch.arange(len(chosen)) % 2 == 1 if clusters is None or not clusters.suffice else clusters.halves()
    for half, other in ((~second, second), (second, ~second)):
        depth = best_depth({depth: values[other] if other.any() else values for depth, values in quality.items()})
        chosen[half] = quality[depth][half]
    return chosen


def flips(by_depth: ByDepth) -> Answers | None:
    """Right and wrong as answers of one cell, at the consecutive depths up to the deepest; None if these are fewer than
    twice `LEAST_TAIL`, or if a value is neither 0 nor 1."""
    depth = max(by_depth)
    run = [depth]
    while (depth := depth - 1) in by_depth:
        run.append(depth)
    right = torch.stack([by_depth[depth].double() for depth in reversed(run)])
    if len(run) < 2 * LEAST_TAIL or not ((right == 0) | (right == 1)).all():
        return None
    return right.long().unsqueeze(-1)


def periods_of(answers: Answers) -> Int[Tensor, "watched"] | None:
    """The period of each problem's answers in the second half of the steps: 1 if they are constant, 0 if they change
    without a period. A period must fit at least three times. None if there are too few steps."""
    tail = answers[len(answers) // 2 :]
    if len(tail) < LEAST_TAIL:
        return None
    found = torch.zeros(tail.shape[1], dtype=torch.long, device=tail.device)
    for period in range(len(tail) // ROUNDS, 0, -1):
        found[(tail[period:] == tail[:-period]).all(-1).all(0)] = period
    return found


@dataclass(frozen=True)
class _Curve:
    """Means of a curve, and the sentences about them."""

    means: Mapping[int, float]
    measure: Measure
    num: int

    def never(self, best: int) -> str:
        return (f"{self.means[best]:.2f} {self.measure.unit} at its best depth {best}, not distinguishable from "
                f"chance ({self.measure.chance:.2f}), over {self.num} {self.measure.over}")

    def moves(self, verb: str, start: int, end: int, change: Change) -> str:
        verb = verb if self.measure.higher_is_better else f"quality {verb}"  # the figure itself goes the other way
        return (f"{verb} from {self.means[start]:.2f} at {start} to {self.means[end]:.2f} {self.measure.unit} at {end} "
                f"steps, {change.size()} paired over {self.num} {self.measure.over}")

    def settles(self, best: int, deepest: int, change: Change) -> str:
        """Quality at the best depth and at the deepest, with the difference if it is significant."""
        text = f"{self.means[best]:.2f} {self.measure.unit} at its best depth {best}"
        if best == deepest:
            return f"{text}, the deepest, over {self.num} {self.measure.over}"
        there = f"{text}, {self.means[deepest]:.2f} at {deepest} steps"
        if not change.told:
            return f"{there}, no significant difference: {change.signed()} paired over {self.num} {self.measure.over}"
        word = "better" if change.mean > 0 else "worse"
        return f"{there}, {word} by {change.size()} paired over {self.num} {self.measure.over}"

    def cycles(self, periods: Tensor, best: int, deepest: int) -> str:
        going = periods > 1
        low, high = confidence_interval(going.double())
        return (f"{going.double().mean():.2f} [{low:.2f}, {high:.2f}] of {len(periods)} {self.measure.over} cycle "
                f"between answers, most often every {int(periods[going].mode().values)} steps, and "
                f"{(periods == 0).double().mean():.2f} change without a period; {self.means[best]:.2f} "
                f"{self.measure.unit} at depth {best}, {self.means[deepest]:.2f} at {deepest}")
