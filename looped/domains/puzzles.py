"""Puzzles: the share of held-out problems that is solved, by depth and difficulty."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from looped.config import Config
from looped.data.batch import Batch
from looped.data.opening import open_data
from looped.data.problems import TaskData
from looped.domains.base import About, Domain, Inputs, Options, Own
from looped.evaluation.depth_page import RunFacts
from looped.evaluation.rows import Keep, Row
from looped.evaluation.solving import one_answer, solved
from looped.evaluation.store import EvaluationFiles
from looped.evaluation.task_report import TaskEvaluation, evaluate_task, task_table, write_task_page
from looped.objectives.base import Objective


@dataclass(frozen=True)
class PuzzlesEvaluated:
    """The figures of a run that solves problems of `data`."""

    result: TaskEvaluation
    data: TaskData
    num_parameters: int

    @property
    def rows(self) -> list[Row]:
        return self.result.rows

    def table(self, name: str) -> str:
        return task_table(self.result, self.data)

    def leave(self, files: EvaluationFiles, config: Config, about: About) -> str:
        write_task_page(files, self.result, self.data, config, self._facts(config, about))
        return f"{files.folder / 'report.html'} holds all of it, with verdicts; rows in {files.folder / 'eval'}"

    def _facts(self, config: Config, about: About) -> RunFacts:
        """The head of the page."""
        stamp, spent = about.stamp, about.spent
        others = {"parameters": f"{self.num_parameters:,}",
                  "machine": f"{stamp.get('machine', 'unknown')}, {stamp.get('device', 'unknown')}",
                  "measured on": about.measured_on}
        task = ", ".join([config.task.name, *(f"{name} {value}" for name, value in config.task.options.items())])
        return RunFacts(about.name, task, config.objective, stamp.get("seed", config.seed), about.step,
                        spent["layer_forwards"], spent["tokens"], spent["seconds"], others)


class Puzzles(Domain):
    """Problems of a task with checkable answers."""

    name = "puzzles"
    flags = frozenset({"difficulties", "exits"})

    def does(self, config: Config) -> str:
        return f"solves {config.task.name}"

    def typical_inputs(self, config: Config) -> Inputs:
        """Problems in the middle of the trained range."""
        data, size = open_data(config), config.training.batch_size // config.training.accumulation
        middle = math.ceil((data.train.low + data.train.high) / 2)
        batch = data.collate([data.task.problem(0, 0, middle)] * size)
        return Inputs([batch], batch.num_rows, data.vocab_size)

    def batches(self, data: TaskData, config: Config) -> Iterable[Batch]:
        """Problems of the hardest trained level."""
        c = config.evaluation
        problems = data.heldout(c.num_problems, data.train.high)
        return (data.collate(problems[start : start + c.batch_size])
                for start in range(0, len(problems), c.batch_size))

    def validate(self, objective: Objective, data: TaskData, config: Config, own: Own) -> dict[str, float]:
        """Shares of held-out problems that are solved at the hardest trained level, and at the best of
        `evaluation.depths`."""
        hardest = data.train.high
        found = solved(objective, data, config, config.evaluation.depths, [hardest])
        depth, share = found.best(hardest)
        first = min(found.per_example[hardest])
        return {"solved": share, "best_depth": depth,
                f"solved_at_{first}": found.per_example[hardest][first].double().mean().item()}

    def preview(self, objective: Objective, data: TaskData, config: Config) -> str:
        """A held-out problem of the hardest trained level, and its answer at the deepest of `evaluation.sample_depths`.
        """
        depth = max(config.evaluation.sample_depths)
        problem, cells = one_answer(objective, data, config, depth, data.train.high)
        return f"depth {depth}\n{data.task.show(problem.inputs)}\n\n{data.task.show(cells)}"

    def evaluate(self, objective: Objective, data: TaskData, config: Config, depths: Sequence[int], options: Options, *,
                 keep: Keep) -> PuzzlesEvaluated:
        result = evaluate_task(objective, data, config, depths, options.difficulties, options.exits, keep=keep)
        return PuzzlesEvaluated(result, data, sum(p.numel() for p in objective.parameters()))
