"""Solving held-out problems at any depth and difficulty, with and without exits, and scoring the answers: as rows."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from looped.config import Config
from looped.data.problems import TaskData
from looped.data.task import Cells, Problem, Task, next_token
from looped.evaluation.depth import peak_bytes
from looped.evaluation.options import Options
from looped.evaluation.rows import Keep, Row, example_lines, keep_nothing, summarise
from looped.evaluation.stability import Stability, stability
from looped.inference.exits import Exit
from looped.inference.rollout import answer, at_once
from looped.objectives.base import Objective, evaluating


@dataclass(frozen=True)
class Solved:
    """`rows`: the share of problems that are solved (`solved`) and of cells that are as in the reference (`cells`), by
    difficulty and depth; `per_example[difficulty][depth]`: which problems are solved."""

    rows: list[Row]
    per_example: dict[int, dict[int, Bool[Tensor, "num"]]]

    def best(self, difficulty: int) -> tuple[int, float]:
        """(depth, share solved) where most are; the shallowest of equals."""
        return best_depth(self.per_example[difficulty])

    def table(self) -> list[list[str]]:
        """Cells of the share solved: a line a difficulty, a column a depth."""
        shares = {(row.difficulty, row.depth): row for row in self.rows if row.metric == "solved"}
        return [[str(difficulty), *(share_cell(shares[difficulty, depth]) for depth in by_depth)]
                for difficulty, by_depth in self.per_example.items()]


def share_cell(row: Row) -> str:
    """`0.912 [0.870, 0.950]`."""
    return f"{row.mean:.3f} [{row.ci_low:.3f}, {row.ci_high:.3f}]"


@dataclass(frozen=True)
class Scores:
    """Of the problems of one difficulty at one depth: which are solved, the share of each one's cells that are as in
    the reference, the steps, layer passes and network evaluations that each took, and the seconds of them all."""

    right: Bool[Tensor, "num"]
    cells: Float[Tensor, "num"]
    used: Float[Tensor, "num"]
    layer_forwards: Float[Tensor, "num"]
    evaluations: Float[Tensor, "num"]
    seconds: float

    @property
    def cost(self) -> dict[str, float]:
        """The columns of a row that say what a problem cost, a mean."""
        return {"seconds": self.seconds, "layer_forwards": self.layer_forwards.mean().item(),
                "evaluations": self.evaluations.mean().item()}


def solved(objective: Objective, data: TaskData, config: Config, depths: Sequence[int],
           difficulties: Sequence[int], *, keep: Keep = keep_nothing) -> Solved:
    """Solve `evaluation.num_problems` held-out problems of each difficulty at each depth. `keep` is given each part
    that is finished."""
    rows, per_example = [], {}
    for difficulty in difficulties:
        per_example[difficulty] = {}
        for group in at_once(objective, depths):
            part, right = [], {}
            for depth, each in score(objective, data, config, difficulty, group).items():
                cost = {"depth": depth, "difficulty": difficulty, "peak_bytes": peak_bytes(), **each.cost}
                part += [summarise("solved", each.right.double(), **cost), summarise("cells", each.cells, **cost)]
                right[depth] = each.right
            keep(part, example_lines("solved", right, difficulty=difficulty))
            rows += part
            per_example[difficulty] |= right
    return Solved(rows, per_example)


def exit_rows(objective: Objective, data: TaskData, config: Config, depth: int, difficulties: Sequence[int],
              exits: Sequence[Exit]) -> Iterator[list[Row]]:
    """With each exit, of at most `depth` steps: the share solved (`solved_with_exit`), the mean steps (`steps_used`),
    and what leaving early costs (`lost_by_exit`: share solved by all the steps less that with the exit, paired)."""
    for difficulty in difficulties:
        full = score(objective, data, config, difficulty, (depth,))[depth]
        for rule in exits:
            left = score(objective, data, config, difficulty, (depth,), exit=rule)[depth]
            fields = {"depth": depth, "difficulty": difficulty, "by": rule.name}
            yield [summarise("solved_with_exit", left.right.double(), **fields, **left.cost),
                   summarise("steps_used", left.used, **fields, **left.cost),
                   summarise("lost_by_exit", full.right.double() - left.right.double(), **fields)]


def best_depth(right: Mapping[int, Bool[Tensor, "num"]]) -> tuple[int, float]:
    """(depth, share that is right) where it is highest; the shallowest of equals."""
    shares = {depth: each.double().mean().item() for depth, each in right.items()}
    depth = max(sorted(shares), key=shares.__getitem__)
    return depth, shares[depth]


def score(objective: Objective, data: TaskData, config: Config, difficulty: int, depths: tuple[int, ...], *,
          exit: Exit | None = None) -> dict[int, Scores]:
    """Depth -> how the held-out problems of one difficulty are solved there."""
    problems = data.heldout(config.evaluation.num_problems, difficulty)
    size, device = config.evaluation.batch_size, next(objective.parameters()).device
    found: dict[int, list[tuple]] = {depth: [] for depth in depths}
    start = time.perf_counter()
    with evaluating(objective):
        for first in range(0, len(problems), size):
            some = problems[first : first + size]
            batch = data.collate(some).to(device)
            for depth, each in answer(objective, batch, depths, config, first=first, exit=exit).items():
                spent = torch.stack([each.used.cpu().double(), each.layer_forwards, each.evaluations], dim=1).tolist()
                for problem, cells, took in zip(some, each.answers.cpu().numpy(), spent, strict=True):
                    found[depth].append((*marked(data, problem, cells), *took))
    seconds = time.perf_counter() - start
    columns = {depth: [torch.tensor(column) for column in zip(*marks, strict=True)] for depth, marks in found.items()}
    return {depth: Scores(right, *(column.double() for column in others), seconds)
            for depth, (right, *others) in columns.items()}


def marked(data: TaskData, problem: Problem, cells: np.ndarray) -> tuple[bool, float]:
    """(whether an answer, as long as its batch, is right, the share of its cells that are as in the reference)."""
    form = next_token(problem) if data.causal and data.task.causal == "next-token" else problem
    cells = cells[: len(form)]
    return is_right(data.task, problem, form, cells), float((cells == form.targets)[form.scored].mean())


def is_right(task: Task, problem: Problem, form: Problem, answer: np.ndarray) -> bool:
    """True if an answer is right. From left to right each token was predicted from the right ones before it, and a
    greedy continuation is the reference exactly where all of these predictions are."""
    if form is not problem:
        return bool((answer == form.targets)[form.scored].all())
    return task.solved_by(problem, answer)


def one_answer(objective: Objective, data: TaskData, config: Config, depth: int,
               difficulty: int) -> tuple[Problem, Cells]:
    """The first held-out problem of a difficulty, and the answer to it with what was given, as long as the problem."""
    problem = data.heldout(1, difficulty)[0]
    batch = data.collate([problem]).to(next(objective.parameters()).device)
    cells = answer(objective, batch, [depth], config)[depth].answers[0].cpu().numpy()
    if len(cells) < len(problem):  # from left to right, where the first cell is given and its successor asked
        cells = np.concatenate([problem.targets[:1], cells])
    return problem, np.where(problem.scored, cells, problem.inputs)


@dataclass(frozen=True)
class Example:
    """An answer (L,) to show, as long as its problem; the cells that are not sought are ignored."""

    task: Task
    problem: Problem
    answer: Cells
    difficulty: int
    depth: int


@dataclass(frozen=True)
class TaskEvaluation:
    """All figures of a run that solves problems."""

    solved: Solved
    exits: list[Row]
    stability: Stability
    example: Example

    @property
    def rows(self) -> list[Row]:
        return self.solved.rows + self.exits


def evaluate_task(objective: Objective, data: TaskData, config: Config, depths: Sequence[int], options: Options, *,
                  keep: Keep = keep_nothing) -> TaskEvaluation:
    """Held-out problems of each difficulty (those of the config, else the task's own) at each depth; and with each
    exit, of at most the deepest; how it comes to rest there, at the level that is nearest to the hardest trained.
    `keep` is given each part that is finished. Raises UserError for levels there are not, and exits that the run
    cannot take."""
    levels = tuple(sorted(options.difficulties or config.evaluation.difficulties or data.task.tested))
    found = solved(objective, data, config, depths, levels, keep=keep)
    exits: list[Row] = []
    for part in exit_rows(objective, data, config, max(depths), levels, options.exits):
        keep(part)
        exits += part
    level = min(levels, key=lambda each: (abs(each - data.train.high), each))
    depth, _ = found.best(level)
    example = Example(data.task, *one_answer(objective, data, config, depth, level), level, depth)
    return TaskEvaluation(found, exits, stability(objective, data, config, max(depths), level), example)
