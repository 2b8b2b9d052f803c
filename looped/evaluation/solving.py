"""Solving held-out problems at any depth: the answers of a loop or of a denoiser's solver, scored by the task.

A loop is unrolled once, to the deepest, and read at each asked depth. A denoiser runs its solver anew for each depth.
An answer is what the last readout holds likeliest in each cell that is sought.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from looped.config import Config
from looped.data.batch import Batch
from looped.data.problems import TaskData
from looped.data.task import Problem, Task, next_token
from looped.diffusion.denoiser import Walk, levels_of
from looped.diffusion.solve import solve
from looped.evaluation.depth import layer_forwards_at, peak_bytes
from looped.evaluation.rows import Row, summarise
from looped.objectives.base import Objective, surroundings
from looped.objectives.bptt import Unrolled
from looped.objectives.denoise import Denoise, only_sought
from looped.rng import StepRandom

Answers = Mapping[int, Int[Tensor, "batch length"]]


@torch.no_grad()
def solve_batch(objective: Objective, batch: Batch, depths: Sequence[int], *, seed: int = 0, first: int = 0) -> Answers:
    """Depth -> the answers there. `first`: the number of the first row, which decides its randomness: a problem is
    solved the same whatever else is in its batch, to rounding."""
    random = StepRandom(seed, 0, start=first, count=len(batch), device=batch.inputs.device)
    if isinstance(objective, Denoise):
        return {depth: DenoisingSolver(objective, batch).logits(depth, random).argmax(-1) for depth in depths}
    return unrolled_answers(objective, batch, depths, random)


def unrolled_answers(objective: Unrolled, batch: Batch, depths: Sequence[int], random: StepRandom) -> Answers:
    """Those of a loop, read along one unroll."""
    model, rows = objective.model, surroundings(batch)
    e = model.encode(batch.inputs, **rows)
    noise = own_normal(random, "state", batch, e.shape[-1]) if model.recurrence.needs_noise else None
    answers = {}

    def read(index: int, state: Tensor) -> None:
        if index + 1 in depths:
            answers[index + 1] = model.decode(state, **rows).argmax(-1)

    model.unroll(e, grad=max(depths), noise=noise, callback=read, **rows)
    return answers


class DenoisingSolver:
    """The configured solver of a denoiser on one batch of problems."""

    def __init__(self, objective: Denoise, batch: Batch):
        self.objective, self.batch, self.rows = objective, batch, surroundings(batch)
        self.e = objective.model.encode(batch.inputs, **self.rows)
        self.context = objective.model.make_context(self.e, objective.config.context)

    def logits(self, depth: int, random: StepRandom, *, stream: str = "") -> Float[Tensor, "batch length symbols"]:
        """The last readout of `depth` steps from pure noise."""
        denoiser, config = self.objective.denoiser, self.objective.config
        walk, dim, calls, logits = Walk(denoiser), denoiser.targets.dim, 0, None

        def denoise(z: Tensor, level) -> Tensor:
            nonlocal logits, calls
            z = only_sought(z.float(), self.batch)
            logits = walk(z, levels_of(z, level), self.e, context=self.context, **self.rows)
            uniform = random.uniform(f"{stream}bridge{calls}", logits.shape[1:2])
            calls += 1
            return denoiser.estimate(logits, uniform)

        solve(config, self.objective.noise, denoise, depth,
              normal=lambda name: own_normal(random, f"{stream}{name}", self.batch, dim))
        return logits


def own_normal(random: StepRandom, stream: str, batch: Batch, dim: int) -> Float[Tensor, "batch length dim"]:
    """Standard normal draws for each row of each sequence, which do not depend on how far the batch is filled up."""
    length = batch.inputs.shape[1]
    if batch.lengths is None:
        return random.normal(stream, (length, dim))
    rows = [torch.randn((int(real), dim), generator=gen)
            for real, gen in zip(batch.lengths, random.per_row(stream), strict=True)]
    filled = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])
    return filled.to(random.device)


@dataclass(frozen=True)
class Solved:
    """`rows`: the share of problems that are solved (`solved`) and of cells that are as in the reference (`cells`), by
    difficulty and depth; `per_example[difficulty][depth]`: which problems are solved."""

    rows: list[Row]
    per_example: dict[int, dict[int, Bool[Tensor, "num"]]]

    def best(self, difficulty: int) -> tuple[int, float]:
        """(depth, share solved) where most are; the shallowest of equals."""
        shares = {depth: right.double().mean().item() for depth, right in self.per_example[difficulty].items()}
        depth = max(sorted(shares), key=shares.__getitem__)
        return depth, shares[depth]


def solved(objective: Objective, data: TaskData, config: Config, depths: Sequence[int],
           difficulties: Sequence[int]) -> Solved:
    """Solve `evaluation.num_problems` held-out problems of each difficulty at each depth."""
    rows, per_example = [], {}
    was_training = objective.training
    objective.eval()
    for difficulty in difficulties:
        problems = data.heldout(config.evaluation.num_problems, difficulty)
        merged = {}
        for group in _at_once(objective, depths):
            merged |= _solved_at(objective, data, config, problems, group)
        per_example[difficulty] = {depth: right for depth, (right, _, _) in merged.items()}
        for depth, (right, cells, seconds) in merged.items():
            cost = {"depth": depth, "difficulty": difficulty, "seconds": seconds, "peak_bytes": peak_bytes(),
                    "layer_forwards": layer_forwards_at(objective, depth)}
            rows += [summarise("solved", right.double(), **cost), summarise("cells", cells, **cost)]
    objective.train(was_training)
    return Solved(rows, per_example)


def _at_once(objective: Objective, depths: Sequence[int]) -> list[tuple[int, ...]]:
    """Depths that one run gives together: all of a loop's, each of a solver's alone."""
    depths = sorted(set(depths))
    return [(depth,) for depth in depths] if isinstance(objective, Denoise) else [tuple(depths)]


def _solved_at(objective: Objective, data: TaskData, config: Config, problems: Sequence[Problem],
               depths: tuple[int, ...]) -> dict[int, tuple[Tensor, Tensor, float]]:
    """Depth -> (which are solved, the share of each one's cells that are right, seconds of them all)."""
    size, device = config.evaluation.batch_size, next(objective.parameters()).device
    right: dict[int, list[bool]] = {depth: [] for depth in depths}
    cells: dict[int, list[float]] = {depth: [] for depth in depths}
    start = time.perf_counter()
    for first in range(0, len(problems), size):
        some = problems[first : first + size]
        batch = data.collate(some)
        answers = solve_batch(objective, batch.to(device), depths, seed=config.seed, first=first)
        for depth, each in answers.items():
            for problem, answer in zip(some, each.cpu().numpy(), strict=True):
                form = next_token(problem) if data.causal and data.task.causal == "next-token" else problem
                answer = answer[: len(form)]
                right[depth].append(is_right(data.task, problem, form, answer))
                cells[depth].append(float((answer == form.targets)[form.scored].mean()))
    seconds = time.perf_counter() - start
    return {depth: (torch.tensor(right[depth]), torch.tensor(cells[depth], dtype=torch.float64), seconds)
            for depth in depths}


def is_right(task: Task, problem: Problem, form: Problem, answer) -> bool:
    """Whether an answer is right. From left to right each token was predicted from the right ones before it, and a
    greedy continuation is the reference exactly where all of these predictions are."""
    if form is not problem:
        return bool((answer == form.targets)[form.scored].all())
    return task.is_right(problem, answer)
