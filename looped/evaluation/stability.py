"""Stability of a loop or solver: step-to-step changes of its latent, and path independence.

The latent is the state of a loop, over all cells, or the soft estimate D of a denoiser, over the predicted cells.
Medians over problems:

    latent_rms     its root mean square
    latent_change  |s_t - s_{t-1}| / |s_t|
    contraction    |s_t - s_{t-1}| / |s_{t-1} - s_{t-2}|: below 1 the changes shrink

For path independence (Anil et al. 2022, arXiv 2211.09961) the same problems are solved again from another start: other
noise or, if a loop's initial state is fixed, the last state of another problem.

    same_answer      fraction of problems with the same predicted cells
    latent_cosine    of the two last latents
    latent_distance  |a - b| / |a|
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from looped.config import Config
from looped.data.batch import Batch
from looped.data.task_data import TaskData
from looped.evaluation.metric_rows import Row, summarise
from looped.evaluation.state_stats import StateStats, growth, norm
from looped.inference.rollout import Readout, Rollout, rollout_of
from looped.objectives.base import Objective, evaluating
from looped.rng import StepRandom
from looped.tensor_types import Float, Int

OTHER_START = 1
"""Step number of the random draws of the other start; the first solve uses 0."""
ROUNDING = 1e-5
"""Relative changes below this are rounding; the step after one has no contraction."""


@dataclass(frozen=True)
class Stability:
    """`rows`: the figures above; per-step figures have the step as `depth`. `answers`: the predicted cells after each
    step, the others blank. `start`: description of the other start."""

    latent: str
    start: str
    depth: int
    difficulty: int
    rows: list[Row]
    answers: Int[Tensor, "steps num cells"]

    def by_step(self, metric: str) -> dict[int, Row]:
        """Step -> row of a per-step figure."""
        return {row.depth: row for row in self.rows if row.metric == metric and row.depth is not None}

    def figure(self, metric: str) -> Row | None:
        """Row of a figure that is not per step; None if it could not be measured."""
        return next((row for row in self.rows if row.metric == metric and row.depth is None), None)

    @property
    def late_contraction(self) -> float | None:
        """Geometric mean of the contraction over the second half of the steps; None if the latent converges before."""
        return self._late(lambda row: row.mean)

    def _late(self, value_of: Callable[[Row], float]) -> float | None:
        late = [math.log(max(value_of(row), 1e-12)) for step, row in self.by_step("contraction").items()
                if step > self.depth / 2]
        return math.exp(sum(late) / len(late)) if late else None

    @property
    def motion(self) -> str:
        """Phrase for the changes in the second half, by both ends of their intervals."""
        low, high = self._late(lambda row: row.ends[0]), self._late(lambda row: row.ends[1])
        if low is None or high is None:
            return ""
        return "shrink" if high < 1 else "do not shrink" if low >= 1 else "neither clearly shrink nor grow"

    @property
    def sentence(self) -> str:
        """Summary of the convergence, and of the dependence on the start."""
        changes = self.by_step("latent_change")
        said = [f"the {self.latent} changes by {changes[max(changes)].mean:.2g} of its norm in the last of "
                f"{max(changes)} steps"] if changes else []
        rate = self.late_contraction
        if rate is not None:
            said.append(f"its changes {self.motion} in the second half, where each is "
                        f"{rate:.2f} of the one before")
        elif changes:
            said.append("it converges before the second half")
        if grows := growth({step: row.mean for step, row in self.by_step("latent_rms").items()}, self.latent):
            said.append(grows)
        same, cosine, distance = map(self.figure, ("same_answer", "latent_cosine", "latent_distance"))
        if same and cosine and distance:
            said.append(f"from another start ({self.start}) {same.shown('.2f', '.2f')} of {same.n} "
                        f" problems have the same answer, the last latents {distance.mean:.2g} of their norm "
                        f"apart, cosine {cosine.mean:.3f}")
        return "; ".join(said)


@torch.no_grad()
def stability(objective: Objective, data: TaskData, config: Config, depth: int, difficulty: int) -> Stability:
    """Solve the held-out problems of one difficulty in `depth` steps from two starts, and measure the latents."""
    problems = data.heldout(config.evaluation.num_problems, difficulty)
    size, device = config.evaluation.batch_size, next(objective.parameters()).device
    seen, rollout = [], rollout_of(objective)
    with evaluating(objective):
        for first in range(0, len(problems), size):
            batch = data.collate(problems[first : first + size]).to(device)
            draws = [StepRandom(config.seed, step, start=first, count=len(batch), device=device)
                     for step in (0, OTHER_START)]
            seen.append(_twice(rollout, batch, depth, *draws))
    answers = [torch.stack(path.answers) for path, _ in seen]  # steps, B, L
    longest = max(each.shape[-1] for each in answers)
    answers = torch.cat([pad(each, (0, longest - each.shape[-1])) for each in answers], dim=1)
    return Stability(rollout.latent, rollout.other_start, depth, difficulty, _rows(seen), answers)


class _Path:
    """Latents and answers of one solve of a batch."""

    def __init__(self, batch: Batch, cells: Tensor | None):
        self.batch, self.motion, self.answers = batch, StateStats(cells), []
        self.last: Tensor | None = None

    def take(self, latent: Tensor, logits: Tensor) -> None:
        self.motion.take(latent)
        self.last = latent
        answers = logits.argmax(-1)
        self.answers.append(answers if self.batch.scored is None else answers * self.batch.scored)


_Twice = tuple[_Path, _Path | None]
"""A solve, and one from another start; None if a problem is alone in its batch and there is no other start."""


def _twice(rollout: Rollout, batch: Batch, depth: int, random: StepRandom, redrawn: StepRandom) -> _Twice:
    def watched(steps: Iterable[Readout]) -> _Path:
        path = _Path(batch, rollout.cells(batch))
        for latent, logits in steps:
            path.take(latent, logits)
        return path

    path = watched(rollout.steps(batch, depth, random))
    others = rollout.steps_elsewhere(batch, depth, redrawn, path.last)
    return path, None if others is None else watched(others)


def _rows(seen: list[_Twice]) -> list[Row]:
    rows: list[Row] = []
    motions = [path.motion for path, _ in seen]
    before = None
    for step in range(len(motions[0].sizes)):
        depth = step + 1
        rows.append(median_row("latent_rms", torch.cat([each.sizes[step] for each in motions]), depth))
        if step == 0:
            continue
        if before is not None and (moving := before > ROUNDING).any():
            ratio = torch.cat([each.ratios[step] for each in motions])
            rows.append(median_row("contraction", ratio[moving], depth))
        before = torch.cat([each.changes[step] for each in motions])
        rows.append(median_row("latent_change", before, depth))
    pairs = [_compare(path, other) for path, other in seen if other is not None]
    if pairs:
        names = ("same_answer", "latent_cosine", "latent_distance")
        rows += [summarise(name, torch.cat(parts)) for name, *parts in zip(names, *pairs, strict=True)]
    return rows


def _compare(path: _Path, other: _Path) -> tuple[Tensor, Tensor, Tensor]:
    """(1 for the same answer, cosine, relative distance) of each problem."""
    a, b = path.motion.latent, other.motion.latent
    same = (path.answers[-1] == other.answers[-1]).all(1)
    cosine = cosine_similarity(a.flatten(1), b.flatten(1))
    distance = norm(a - b) / norm(a).clamp_min(1e-30)
    return same.cpu().double(), cosine.cpu().double(), distance.cpu().double()


def median_row(metric: str, values: Float[Tensor, "num"], depth: int | None = None) -> Row:
    """The median with its 95 % interval by order statistics: the number of values below it is binomial(num, 1/2)."""
    values, num = values.sort().values, len(values)
    reach = 0.98 * math.sqrt(num)
    low, high = max(math.floor(num / 2 - reach), 0), min(math.ceil(num / 2 + reach), num - 1)
    return Row(metric, values.quantile(0.5).item(), values[low].item(), values[high].item(), num, depth=depth)
