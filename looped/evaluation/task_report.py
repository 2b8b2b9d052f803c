"""What `looped eval` leaves of a run that solves problems: rows in the run's folder, a table over depth and difficulty,
a page.

    runs/<name>/eval/depth.jsonl     one row a figure: {depth, difficulty, metric, mean, ci_low, ci_high, n, ...}
    runs/<name>/eval/examples.jsonl  which held-out problems are solved, for paired comparisons
    runs/<name>/report.html          the page, with verdicts (depth_page.py); its pictures in plots/, where also
                                     partition.png is, of which of several blocks has which noise levels
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from looped.config import Config
from looped.data.problems import TaskData
from looped.evaluation.depth_page import DepthReport, Example, RunFacts, write_depth_report
from looped.evaluation.plots_tasks import Trained
from looped.evaluation.report import markdown_table, picture_blocks
from looped.evaluation.rows import Keep, Row, keep_nothing, row_of
from looped.evaluation.solving import Solved, exit_rows, one_answer, share_cell, solved
from looped.evaluation.stability import Stability, stability
from looped.evaluation.store import EXAMPLES, ROWS, EvaluationFiles, writing_to
from looped.inference.exits import Exit
from looped.objectives import trained_depths
from looped.objectives.base import Objective


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


def write_task_page(files: EvaluationFiles, result: TaskEvaluation, data: TaskData, config: Config,
                    facts: RunFacts) -> None:
    """The page of all that was measured of a checkpoint, now and before. Raises UserError."""
    trained = Trained(trained_depths(config), (data.train.low, data.train.high))
    with writing_to(files.folder), files.lock():
        rows = [row_of(line) for line in files.read(ROWS)]
        report = DepthReport(facts, data.task.difficulty, trained, [row for row in rows if row.by is None],
                             _solved(files), [result.stability], [row for row in rows if row.by is not None],
                             result.example)
        write_depth_report(files.folder / "report.html", report)
        picture_blocks(files.folder, config)


def _solved(files: EvaluationFiles) -> dict[int, dict[int, Bool[Tensor, "num"]]]:
    """Difficulty -> depth -> which problems were solved, ascending."""
    found: dict[int, dict[int, Tensor]] = {}
    for line in sorted(files.read(EXAMPLES), key=lambda line: (line["difficulty"], line["depth"])):
        found.setdefault(line["difficulty"], {})[line["depth"]] = torch.tensor(line["values"]) > 0
    return found


def task_table(result: TaskEvaluation, data: TaskData) -> str:
    """Markdown: the share of problems solved, a line a difficulty and a column a depth; then the exits."""
    depths = list(next(iter(result.solved.per_example.values())))
    trained = f"trained from {data.train.low} to {data.train.high}"
    text = (f"share of problems solved, with 95 % intervals; {data.task.difficulty}, {trained}\n\n"
            + markdown_table([data.task.difficulty, *(f"depth {depth}" for depth in depths)], result.solved.table()))
    if not result.exits:
        return text
    figures = {(row.difficulty, row.by, row.metric): row for row in result.exits}
    most = {(row.difficulty, row.depth): row.evaluations for row in result.solved.rows}
    lines = [[str(difficulty), by, f"{row.mean:.1f} of {most[difficulty, row.depth]:.0f}", f"{row.layer_forwards:,.1f}",
              *(share_cell(figures[difficulty, by, name]) for name in ("solved_with_exit", "lost_by_exit"))]
             for (difficulty, by, metric), row in figures.items() if metric == "steps_used"]
    header = [data.task.difficulty, "exit", "mean evaluations", "layer forwards", "solved", "lost"]
    return f"{text}\n\n" + markdown_table(header, lines)
