"""The domain of tasks with checkable answers: the fraction of held-out problems solved, by depth and difficulty."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from looped.config import Config
from looped.data.batch import Batch
from looped.data.from_config import open_data
from looped.data.task_data import HELDOUT_SEED, TaskData
from looped.domains.base import About, Domain, Evaluated, Inputs, Options, Own
from looped.evaluation.metric_rows import Keep, row_of
from looped.evaluation.plots_tasks import Trained
from looped.evaluation.result_files import EXAMPLES, ROWS, EvaluationFiles, writing_to
from looped.evaluation.solving import TaskEvaluation, evaluate_task, levels_of, one_answer, share_cell, solved
from looped.evaluation.workers import Workers
from looped.objectives import trained_depths
from looped.objectives.base import Objective
from looped.reports.depth import DepthReport, write_depth_report
from looped.reports.runs import picture_blocks
from looped.reports.sections import Prose, Section, Table
from looped.tensor_types import Bool


@dataclass(frozen=True)
class PuzzlesEvaluated(Evaluated):
    """The results of a run that solves problems of `data`.

    runs/<name>/eval/depth.jsonl        one row per metric: {depth, difficulty, metric, mean, ci_low, ci_high, n, ...}
    runs/<name>/eval/examples.jsonl     the held-out problems that are solved, for paired comparisons
    runs/<name>/report.html, report.md  verdicts (looped.reports.depth); their pictures are in plots/, with
                                        partition.png, the noise levels of each of several blocks
    """

    result: TaskEvaluation
    data: TaskData
    num_parameters: int

    def sections(self, name: str) -> list[Section]:
        """The share of problems solved, one line per difficulty and one column per depth; then the exits."""
        data, solved = self.data, self.result.solved
        depths = next(iter(solved.per_example.values()))
        return [Prose(f"share of problems solved, with 95 % intervals; {data.task.difficulty}, trained from "
                      f"{data.trained[0]} to {data.trained[1]}"),
                Table([data.task.difficulty, *(f"depth {depth}" for depth in depths)], solved.table()),
                *self._by_any(), self._exits()]

    def _by_any(self) -> list[Section]:
        """The share of problems that any of several trajectories solves, and what a problem cost."""
        solved = self.result.solved
        rows = [row for row in solved.rows if row.metric == "solved_by_any"]
        if not rows:
            return []
        depths = list(next(iter(solved.per_example.values())))
        cost = {row.depth: f"{row.layer_forwards:,.0f}" for row in rows}
        return [Prose(f"share of problems that any of {rows[0].trajectories} trajectories solves, the bound of "
                      f"choosing one of them; below, layer forwards per problem, of all trajectories"),
                Table([self.data.task.difficulty, *(f"depth {depth}" for depth in depths)],
                      [*solved.table("solved_by_any"), ["layer forwards", *(cost[depth] for depth in depths)]])]

    def _exits(self) -> Table:
        figures = {(row.difficulty, row.by, row.metric): row for row in self.result.exits}
        most = {(row.difficulty, row.depth): row.evaluations for row in self.result.solved.rows}
        lines = [[str(difficulty), by, f"{row.mean:.1f} of {most[difficulty, row.depth]:.0f}",
                  f"{row.layer_forwards:,.1f}",
                  *(share_cell(figures[difficulty, by, name]) for name in ("solved_with_exit", "lost_by_exit"))]
                 for (difficulty, by, metric), row in figures.items() if metric == "steps_used"]
        return Table([self.data.task.difficulty, "exit", "mean evaluations", "layer forwards", "solved", "lost"], lines)

    def leave(self, files: EvaluationFiles, config: Config, about: About) -> str:
        """Write the report of all measurements of a checkpoint, new and earlier ones. Raises UserError."""
        data = self.data
        with writing_to(files.folder), files.lock():
            rows = [row_of(line) for line in files.read(ROWS)]
            write_depth_report(files.folder, DepthReport(
                about.name, self._facts(config, about), data.task.difficulty,
                Trained(trained_depths(config), data.trained),
                [row for row in rows if row.by is None], _solved(files), [self.result.stability],
                [row for row in rows if row.by is not None], self.result.example))
            picture_blocks(files.folder, config)
        return f"{files.folder / 'report.html'} holds all of it, with verdicts; rows in {files.folder / 'eval'}"

    def _facts(self, config: Config, about: About) -> dict[str, str]:
        """The head of the report."""
        stamp, spent = about.stamp, about.spent
        options = [f"{name} {value}" for name, value in config.task.options.items()]
        task = self.data.source or ", ".join([config.task.name, *options])
        return {"task": task, "rule": config.objective, "seed": str(stamp.get("seed", config.seed)),
                "step": f"{about.step:,}",
                "training": f"{spent['layer_forwards']:,.0f} layer forwards, {spent['tokens']:,} tokens, "
                            f"{spent['seconds']:,.0f} seconds",
                "parameters": f"{self.num_parameters:,}",
                "machine": f"{stamp.get('machine', 'unknown')}, {stamp.get('device', 'unknown')}",
                "measured on": about.measured_on}


def _solved(files: EvaluationFiles) -> dict[int, dict[int, Bool[Tensor, "num"]]]:
    """Difficulty -> depth -> mask of the solved problems, ascending."""
    found: dict[int, dict[int, Tensor]] = {}
    for line in sorted(files.read(EXAMPLES), key=lambda line: (line["difficulty"], line["depth"])):
        found.setdefault(line["difficulty"], {})[line["depth"]] = torch.tensor(line["values"]) > 0
    return found


class Puzzles(Domain):
    """Problems of a task with checkable answers."""

    name = "puzzles"
    flags: ClassVar[frozenset[str]] = frozenset({"difficulties", "exits", "puzzles"})

    def hardest(self, config: Config) -> str:
        data = open_data(config)
        return f"; the hardest trained difficulty is {data.task.difficulty} {data.train.high}"

    def does(self, config: Config) -> str:
        return f"solves {config.task.name}"

    def first_inputs(self, config: Config) -> Inputs:
        """The first training batch; if a batch has one difficulty, one of the hardest instead, which needs the most."""
        if config.task.per_problem:
            return super().first_inputs(config)
        high = open_data(config).train.high
        return super().first_inputs(config.replace(**{"task.difficulty": (high, high)}))

    def typical_inputs(self, config: Config) -> Inputs:
        """Problems spread evenly over the trained range: of its mean difficulty, and as long as a batch is padded. If a
        batch has one difficulty, up to five batches from the easiest to the hardest."""
        data, size = open_data(config), config.training.batch_size // config.training.accumulation
        low, num = data.train.low, data.train.high - data.train.low + 1
        levels = [low + (2 * row + 1) * num // (2 * size) for row in range(size)]
        batches = [levels]
        if not config.task.per_problem:
            several = min(num, 5)
            batches = [[low + round(part * (num - 1) / max(several - 1, 1))] * size for part in range(several)]
        problems = {level: data.task.problem(0, 0, level) for level in set().union(*batches)}
        parts = [data.collate([problems[level] for level in batch]) for batch in batches]
        return Inputs(parts, parts[0].num_rows, data.vocab_size)

    def batches(self, data: TaskData, config: Config) -> Iterable[Batch]:
        """Problems of the hardest trained difficulty."""
        c = config.evaluation
        problems = data.heldout(c.num_problems, data.train.high)
        return (data.collate(problems[start : start + c.batch_size])
                for start in range(0, len(problems), c.batch_size))

    def validate(self, objective: Objective, data: TaskData, config: Config, own: Own,
                 workers: Workers) -> dict[str, float]:
        """Fraction of held-out problems solved at the hardest trained difficulty, at the best and the smallest of
        `evaluation.depths`."""
        hardest = data.train.high
        found = solved(objective, data, config, config.evaluation.depths, [hardest], workers=workers)
        depth, share = found.best(hardest)
        first = min(found.per_example[hardest])
        return {"solved": share, "best_depth": depth,
                f"solved_at_{first}": found.per_example[hardest][first].double().mean().item()}

    def preview(self, objective: Objective, data: TaskData, config: Config, workers: Workers) -> str:
        """A held-out problem of the hardest trained difficulty, and its answer at the deepest of
        `evaluation.sample_depths`."""
        def at(depth: int) -> str:
            problem, cells = one_answer(objective, data, config, depth, data.train.high)
            return f"depth {depth}\n{data.task.show(problem.inputs)}\n\n{data.task.show(cells)}"

        return workers.over([max(config.evaluation.sample_depths)], at)[0]

    def sequences(self, data: TaskData, config: Config, options: Options) -> list[dict[str, Any]]:
        num = config.evaluation.num_problems
        return [{"difficulty": level, "seed": HELDOUT_SEED, "index": list(range(data.num_heldout(num, level)))}
                for level in levels_of(data, config, options)]

    def evaluate(self, objective: Objective, data: TaskData, config: Config, depths: Sequence[int], options: Options, *,
                 keep: Keep) -> PuzzlesEvaluated:
        result = evaluate_task(objective, data, config, depths, options, keep=keep)
        return PuzzlesEvaluated(result.rows, result, data, sum(p.numel() for p in objective.parameters()))
