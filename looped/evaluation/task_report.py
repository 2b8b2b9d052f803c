"""What `looped eval` leaves of a run that solves problems: rows in the run's folder, a table over depth and difficulty,
a page.

    runs/<name>/eval/depth.jsonl     one row a figure: {depth, difficulty, metric, mean, ci_low, ci_high, n, ...}
    runs/<name>/eval/examples.jsonl  which held-out problems are solved, for paired comparisons
    runs/<name>/report.html          the page, with verdicts (depth_page.py); its pictures in plots/, where also
                                     partition.png is, of which of several blocks has which noise levels
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looped.config import Config
from looped.data.problems import TaskData
from looped.evaluation.depth_page import DepthReport, Example, RunFacts, write_depth_report
from looped.evaluation.exits import Exit
from looped.evaluation.plots_tasks import Trained
from looped.evaluation.report import EXAMPLES, ROWS, cannot_write, markdown_table, picture_blocks, write_lines
from looped.evaluation.rows import Row
from looped.evaluation.solving import Solved, exit_rows, one_answer, solved
from looped.evaluation.stability import Stability, stability
from looped.objectives.base import Objective
from looped.objectives.depth import trained_depths


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
                  difficulties: Sequence[int] | None = None, exits: Sequence[Exit] = ()) -> TaskEvaluation:
    """Held-out problems of each difficulty (those of the config, else the task's own) at each depth; and with each
    exit, of at most the deepest; how it comes to rest there, at the level that is nearest to the hardest trained.
    Raises UserError for levels there are not, and exits that the run cannot take."""
    levels = tuple(sorted(difficulties or config.evaluation.difficulties or data.task.tested))
    found = solved(objective, data, config, depths, levels)
    exits = exit_rows(objective, data, config, max(depths), levels, exits) if exits else []
    level = min(levels, key=lambda each: (abs(each - data.train.high), each))
    depth, _ = found.best(level)
    example = Example(data.task, *one_answer(objective, data, config, depth, level), level, depth)
    return TaskEvaluation(found, exits, stability(objective, data, config, max(depths), level), example)


def save_task_evaluation(run: Path, result: TaskEvaluation, data: TaskData, config: Config, facts: RunFacts, *,
                         about: Mapping[str, Any]) -> None:
    """Write everything of an evaluation into the folder of a run; `about`: what all lines say, as in `save_evaluation`.
    Raises UserError."""
    examples = [{**about, "metric": "solved", "difficulty": difficulty, "depth": depth,
                 "values": right.double().tolist()}
                for difficulty, by_depth in result.solved.per_example.items() for depth, right in by_depth.items()]
    write_lines(run, {ROWS: [{**about, **row.as_dict()} for row in result.rows], EXAMPLES: examples})
    trained = Trained(trained_depths(config), (data.train.low, data.train.high))
    report = DepthReport(facts, data.task.difficulty, trained, result.solved.rows, result.solved.per_example,
                         [result.stability], result.exits, result.example)
    try:
        write_depth_report(run / "report.html", report)
        picture_blocks(run, config)
    except OSError as error:
        raise cannot_write(run, error) from None


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
