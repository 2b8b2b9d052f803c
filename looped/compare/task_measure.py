"""Measurement of runs on a task: which held-out problems are solved, by depth and difficulty."""

from typing import Any, ClassVar

from looped.compare.accuracy_measure import ShareMeasured, ShareMeasurer, as_json, by_text
from looped.compare.curve import Metric
from looped.compare.plan import AGAIN, Plan, RunSpec
from looped.config import Config
from looped.data.task_data import TaskData, prepare_task, trained_range
from looped.devices import CPU, Placement
from looped.errors import UserError
from looped.evaluation.plots import AXES
from looped.evaluation.solving import solved

SHARE_SOLVED = Metric("solved", "share solved", " at the hardest trained difficulty", AXES["solved"],
                     higher_is_better=True, worst=0.0, examples="problems", is_share=True,
                     milestones=(0.5, 0.9, 0.95))


class TaskMeasured(ShareMeasured):
    """One run on a task."""

    gauge = SHARE_SOLVED

    @property
    def hardest(self) -> int:
        """The hardest trained difficulty."""
        return trained_range(self.place.config.task)[1]


class TaskMeasurer(ShareMeasurer):
    """Solves the same held-out problems with every arm and seed."""

    measured: ClassVar[type[TaskMeasured]] = TaskMeasured

    def __init__(self, plan: Plan, finished: list[RunSpec], placement: Placement = CPU):
        super().__init__(plan, finished, placement)
        self.data: TaskData = prepare_task(plan.config.task)
        self.levels: list[int] = levels_of(plan.config)

    def inputs(self, place: RunSpec) -> dict[str, Any]:
        return super().inputs(place) | {"levels": self.levels, "task": self.data.fingerprint}

    def evaluate(self, place: RunSpec) -> dict[str, Any]:
        run = self.load(place)
        run.identity.check(self.data, run.path, AGAIN)
        found = solved(run.objective, self.data, run.config, self.depths(place), self.levels)
        several = {"by_any": by_text(found.by_any)} if run.config.evaluation.trajectories > 1 else {}
        return as_json(found.rows, found.per_example) | several


def levels_of(config: Config) -> list[int]:
    """The measured difficulties: the hardest trained one, and those of the config, or of the task if it names none."""
    data = prepare_task(config.task)
    return sorted({data.train.high, *(config.evaluation.difficulties or data.task.tested)})


def check_task(plan: Plan) -> None:
    """Raises UserError if the task, its layout or a difficulty is not available, or if there are too few problems."""
    data = prepare_task(plan.config.task)
    num = plan.config.evaluation.num_problems
    if num < 2:
        raise UserError(f"evaluation.num_problems {num} is too few, since a comparison chooses depths on one half and "
                        f"reports the other; set it to 2 or more")
    for difficulty in levels_of(plan.config):
        if len(data.heldout(2, difficulty)) < 2:
            raise UserError(f"{data.task.name} has one held-out problem of difficulty {difficulty}, too few for a "
                            f"comparison, which chooses depths on one half and reports the other; give more")
