"""What `looped eval` leaves of a run that solves problems: rows in the run's folder, a table over depth and difficulty.

    runs/<name>/eval/depth.jsonl     one row a figure: {depth, difficulty, metric, mean, ci_low, ci_high, n, ...}
    runs/<name>/eval/examples.jsonl  which held-out problems are solved, for paired comparisons
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from looped.config import Config
from looped.data.problems import TaskData
from looped.evaluation.exits import Exit
from looped.evaluation.report import EXAMPLES, ROWS, markdown_table, write_lines
from looped.evaluation.rows import Row
from looped.evaluation.solving import Solved, exit_rows, solved
from looped.objectives.base import Objective


@dataclass(frozen=True)
class TaskEvaluation:
    """All figures of a run that solves problems."""

    solved: Solved
    exits: list[Row]

    @property
    def rows(self) -> list[Row]:
        return self.solved.rows + self.exits


def evaluate_task(objective: Objective, data: TaskData, config: Config, depths: Sequence[int],
                  difficulties: Sequence[int] | None = None, exits: Sequence[Exit] = ()) -> TaskEvaluation:
    """Held-out problems of each difficulty (those of the config, else the task's own) at each depth; and with each
    exit, of at most the deepest. Raises UserError for levels there are not, and exits that the run cannot take."""
    levels = tuple(difficulties or config.evaluation.difficulties or data.task.tested)
    return TaskEvaluation(solved(objective, data, config, depths, levels),
                          exit_rows(objective, data, config, max(depths), levels, exits) if exits else [])


def save_task_evaluation(run: Path, result: TaskEvaluation, config: Config, *, step: int) -> None:
    """Write everything of an evaluation of the checkpoint of `step` into the folder of a run. Raises UserError."""
    examples = [{"step": step, "metric": "solved", "difficulty": difficulty, "depth": depth,
                 "values": right.double().tolist()}
                for difficulty, by_depth in result.solved.per_example.items() for depth, right in by_depth.items()]
    write_lines(run, {ROWS: [{"step": step, **row.as_dict()} for row in result.rows], EXAMPLES: examples})


def task_table(result: TaskEvaluation, data: TaskData) -> str:
    """Markdown: the share of problems solved, a line a difficulty and a column a depth; then the exits."""
    depths = list(next(iter(result.solved.per_example.values())))
    trained = f"trained from {data.train.low} to {data.train.high}"
    text = (f"share of problems solved, with 95 % intervals; {data.task.difficulty}, {trained}\n\n"
            + markdown_table([data.task.difficulty, *(f"depth {depth}" for depth in depths)], result.solved.table()))
    if not result.exits:
        return text
    figures = {(row.difficulty, row.by, row.metric): row for row in result.exits}
    lines = [[str(difficulty), by, f"{row.mean:.1f} of {row.depth}",
              f"{figures[difficulty, by, 'solved_with_exit'].mean:.3f}",
              f"{figures[difficulty, by, 'lost_by_exit'].mean:.3f}"]
             for (difficulty, by, metric), row in figures.items() if metric == "steps_used"]
    return f"{text}\n\n" + markdown_table([data.task.difficulty, "exit", "mean steps", "solved", "lost"], lines)
