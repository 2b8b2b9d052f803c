"""Scores of held-out problems solved at any depth and difficulty, with and without early exits, as rows."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from looped.config import Config
from looped.data.task import Cells, Problem, Task, next_token
from looped.data.task_data import TaskData
from looped.evaluation.depth_sweep import peak_bytes
from looped.evaluation.metric_rows import Keep, Row, example_lines, keep_nothing, summarise
from looped.evaluation.options import Options
from looped.evaluation.stability import Stability, stability
from looped.evaluation.workers import ALONE, Workers
from looped.inference.exits import Exit
from looped.inference.rollout import answer, at_once
from looped.objectives.base import Objective, evaluating
from looped.tensor_types import Bool, Float


@dataclass(frozen=True)
class Solved:
    """`rows`: share of problems solved (`solved`) and fraction of cells equal to the reference (`cells`), by difficulty
    and depth; with several trajectories also the share that any of them solves (`solved_by_any`, pass@k), the bound of
    every choice of one of them. `per_example[difficulty][depth]`: mask of the problems solved; `by_any`: of those that
    any trajectory solves."""

    rows: list[Row]
    per_example: dict[int, dict[int, Bool[Tensor, "num"]]]
    by_any: dict[int, dict[int, Bool[Tensor, "num"]]]

    def best(self, difficulty: int) -> tuple[int, float]:
        """(depth, share solved) of the depth that solves most; ties go to the shallowest."""
        return best_depth(self.per_example[difficulty])

    def table(self, metric: str = "solved") -> list[list[str]]:
        """Table of a share: one line per difficulty, one column per depth; no line if it was not measured."""
        shares = {(row.difficulty, row.depth): row for row in self.rows if row.metric == metric}
        return [[str(difficulty), *(share_cell(shares[difficulty, depth]) for depth in by_depth)]
                for difficulty, by_depth in self.per_example.items() if (difficulty, min(by_depth)) in shares]


def share_cell(row: Row) -> str:
    """A share and its interval, as `0.912 [0.870, 0.950]`."""
    return row.shown()


@dataclass(frozen=True)
class Scores:
    """Results on the problems of one difficulty at one depth. right: mask of the problems solved. by_any: of those that
    any of the trajectories solves. cells: fraction of each problem's cells equal to the reference. used,
    layer_forwards, evaluations: steps, layer passes and network evaluations (NFE) of each, of all its trajectories.
    seconds: of all."""

    right: Bool[Tensor, "num"]
    by_any: Bool[Tensor, "num"]
    cells: Float[Tensor, "num"]
    used: Float[Tensor, "num"]
    layer_forwards: Float[Tensor, "num"]
    evaluations: Float[Tensor, "num"]
    seconds: float

    @property
    def cost(self) -> dict[str, float]:
        """The cost columns of a row: total seconds, mean layer passes and NFE per problem."""
        return {"seconds": self.seconds, "layer_forwards": self.layer_forwards.mean().item(),
                "evaluations": self.evaluations.mean().item()}


def solved(objective: Objective, data: TaskData, config: Config, depths: Sequence[int],
           difficulties: Sequence[int], *, keep: Keep = keep_nothing, workers: Workers = ALONE) -> Solved:
    """Solve `evaluation.num_problems` held-out problems of each difficulty at each depth. `keep` receives each
    finished part. workers: the processes that divide the batches."""
    rows, per_example, by_any, tries = [], {}, {}, config.evaluation.trajectories
    for difficulty in difficulties:
        per_example[difficulty], by_any[difficulty] = {}, {}
        for group in at_once(objective, depths):
            part, right = [], {}
            for depth, each in score(objective, data, config, difficulty, group, workers=workers).items():
                cost = {"depth": depth, "difficulty": difficulty, "peak_bytes": peak_bytes(), **each.cost,
                        "trajectories": tries if tries > 1 else None}
                part += [summarise("solved", each.right.double(), **cost), summarise("cells", each.cells, **cost)]
                part += [summarise("solved_by_any", each.by_any.double(), **cost)] if tries > 1 else []
                right[depth], by_any[difficulty][depth] = each.right, each.by_any
            keep(part, example_lines("solved", right, difficulty=difficulty))
            rows += part
            per_example[difficulty] |= right
    return Solved(rows, per_example, by_any)


def exit_rows(objective: Objective, data: TaskData, config: Config, depth: int, difficulties: Sequence[int],
              exits: Sequence[Exit]) -> Iterator[list[Row]]:
    """Rows per exit, with at most `depth` steps: the share solved (`solved_with_exit`), the mean steps (`steps_used`),
    and the cost of exiting early (`lost_by_exit`: share solved with all steps minus with the exit, paired)."""
    for difficulty in difficulties:
        full = score(objective, data, config, difficulty, (depth,))[depth]
        for rule in exits:
            left = score(objective, data, config, difficulty, (depth,), exit=rule)[depth]
            fields = {"depth": depth, "difficulty": difficulty, "by": rule.name}
            yield [summarise("solved_with_exit", left.right.double(), **fields, **left.cost),
                   summarise("steps_used", left.used, **fields, **left.cost),
                   summarise("lost_by_exit", full.right.double() - left.right.double(), **fields)]


def best_depth(right: Mapping[int, Bool[Tensor, "num"]]) -> tuple[int, float]:
    """(depth, fraction right) of the best depth; ties go to the shallowest."""
    shares = {depth: each.double().mean().item() for depth, each in right.items()}
    depth = max(sorted(shares), key=shares.__getitem__)
    return depth, shares[depth]


def score(objective: Objective, data: TaskData, config: Config, difficulty: int, depths: tuple[int, ...], *,
          exit: Exit | None = None, workers: Workers = ALONE) -> dict[int, Scores]:
    """Depth -> scores of the held-out problems of one difficulty. workers: the processes that divide the batches."""
    problems = data.heldout(config.evaluation.num_problems, difficulty)
    size = workers.batch_size(config.evaluation.batch_size, len(problems))
    device = next(objective.parameters()).device
    start = time.perf_counter()

    def marks(first: int) -> dict[int, list[tuple]]:
        some, found = problems[first : first + size], {}
        batch = data.collate(some).to(device)
        for depth, each in answer(objective, batch, depths, config, first=first, exit=exit).items():
            spent = torch.stack([each.used.cpu().double(), each.layer_forwards, each.evaluations], dim=1).tolist()
            scores = [marked(data, problem, cells)
                      for problem, cells in zip(some, each.answers.cpu().numpy(), strict=True)]
            by_any = [right for right, _ in scores] if each.tried is None else [
                any_right(data, problem, own) for problem, own in zip(some, each.tried.cpu().numpy().swapaxes(0, 1),
                                                                      strict=True)]
            found[depth] = [(*score, one, *took) for score, one, took in zip(scores, by_any, spent, strict=True)]
        return found

    with evaluating(objective):
        parts = workers.over(range(0, len(problems), size), marks)
    seconds = time.perf_counter() - start
    columns = {depth: [torch.tensor(column) for column in zip(*(row for part in parts for row in part[depth]),
                                                              strict=True)] for depth in depths}
    return {depth: Scores(right, by_any, cells.double(), *(column.double() for column in spent), seconds)
            for depth, (right, cells, by_any, *spent) in columns.items()}


def marked(data: TaskData, problem: Problem, cells: np.ndarray) -> tuple[bool, float]:
    """Score of one answer, padded as in its batch: (right or not, fraction of scored cells equal to the reference)."""
    form = form_of(data, problem)
    cells = cells[: len(form)]
    return is_right(data.task, problem, form, cells), float((cells == form.targets)[form.scored].mean())


def any_right(data: TaskData, problem: Problem, tried: np.ndarray) -> bool:
    """True if any of the answers (R, L) of a problem's trajectories is right."""
    form = form_of(data, problem)
    different = {cells[: len(form)][form.scored].tobytes(): cells[: len(form)] for cells in tried}
    return any(is_right(data.task, problem, form, cells) for cells in different.values())


def form_of(data: TaskData, problem: Problem) -> Problem:
    """The problem as the network gets it."""
    return next_token(problem) if data.causal and data.task.causal == "next-token" else problem


def is_right(task: Task, problem: Problem, form: Problem, answer: np.ndarray) -> bool:
    """True if an answer is right. In next-token form each token was predicted from the correct ones before it; greedy
    decoding gives the reference if and only if all of these predictions are correct."""
    if form is not problem:
        return bool((answer == form.targets)[form.scored].all())
    return task.solved_by(problem, answer)


def one_answer(objective: Objective, data: TaskData, config: Config, depth: int,
               difficulty: int) -> tuple[Problem, Cells]:
    """The first held-out problem of a difficulty, and its answer with the given cells filled in, of equal length."""
    problem = data.heldout(1, difficulty)[0]
    batch = data.collate([problem]).to(next(objective.parameters()).device)
    cells = answer(objective, batch, [depth], config)[depth].answers[0].cpu().numpy()
    if len(cells) < len(problem):  # next-token form: the first cell is given, the second is the first answer
        cells = np.concatenate([problem.targets[:1], cells])
    return problem, np.where(problem.scored, cells, problem.inputs)


@dataclass(frozen=True)
class Example:
    """An answer (L,) to show, as long as its problem; the cells that are not scored are ignored."""

    task: Task
    problem: Problem
    answer: Cells
    difficulty: int
    depth: int


@dataclass(frozen=True)
class TaskEvaluation:
    """All results of a run that solves problems."""

    solved: Solved
    exits: list[Row]
    stability: Stability
    example: Example

    @property
    def rows(self) -> list[Row]:
        return self.solved.rows + self.exits


def levels_of(data: TaskData, config: Config, options: Options) -> tuple[int, ...]:
    """The difficulties of an evaluation, ascending: of the options, else of the config, else the task's own, else the
    hardest trained one."""
    return tuple(sorted(options.difficulties or config.evaluation.difficulties or data.task.tested
                        or (data.train.high,)))


def evaluate_task(objective: Objective, data: TaskData, config: Config, depths: Sequence[int], options: Options, *,
                  keep: Keep = keep_nothing) -> TaskEvaluation:
    """Everything `looped eval` reports on a run that solves problems: scores, early exits, stability, one example.

    Scores are by difficulty (`levels_of`) and depth. Exits take at most the deepest depth. Stability is measured at
    the deepest depth, at the difficulty nearest to the hardest trained one. `keep` receives each finished part. Raises
    UserError for difficulties that do not exist, and for exits that the run does not support.
    """
    levels = levels_of(data, config, options)
    found = solved(objective, data, config, depths, levels, keep=keep)
    exits: list[Row] = []
    for part in exit_rows(objective, data, config, max(depths), levels, options.exits):
        keep(part)
        exits += part
    level = min(levels, key=lambda each: (abs(each - data.trained[1]), each))
    depth, _ = found.best(level)
    example = Example(data.task, *one_answer(objective, data, config, depth, level), level, depth)
    return TaskEvaluation(found, exits, stability(objective, data, config, max(depths), level), example)
