"""All that `looped eval` measures of a run that solves problems."""

from collections.abc import Sequence
from dataclasses import dataclass

from looped.config import Config
from looped.data.problems import TaskData
from looped.data.task import Cells, Problem, Task
from looped.evaluation.rows import Keep, Row, keep_nothing
from looped.evaluation.solving import Solved, exit_rows, one_answer, solved
from looped.evaluation.stability import Stability, stability
from looped.inference.exits import Exit
from looped.objectives.base import Objective


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


def evaluate_task(objective: Objective, data: TaskData, config: Config, depths: Sequence[int],
                  difficulties: Sequence[int] | None = None, exits: Sequence[Exit] = (), *,
                  keep: Keep = keep_nothing) -> TaskEvaluation:
    """Held-out problems of each difficulty (those of the config, else the task's own) at each depth; and with each
    exit, of at most the deepest; how it comes to rest there, at the level that is nearest to the hardest trained.
    `keep` is given each part that is finished. Raises UserError for levels there are not, and exits that the run
    cannot take."""
    levels = tuple(sorted(difficulties or config.evaluation.difficulties or data.task.tested))
    found = solved(objective, data, config, depths, levels, keep=keep)
    exits = exit_rows(objective, data, config, max(depths), levels, exits, keep=keep) if exits else []
    level = min(levels, key=lambda each: (abs(each - data.train.high), each))
    depth, _ = found.best(level)
    example = Example(data.task, *one_answer(objective, data, config, depth, level), level, depth)
    return TaskEvaluation(found, exits, stability(objective, data, config, max(depths), level), example)
