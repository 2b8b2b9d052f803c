"""What a comparison measures of runs on a task: which held-out problems are solved, over depth and difficulty."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from looped.compare.curve import Gauge
from looped.compare.measure import Measured, Measurer, load
from looped.compare.plan import Place, Plan
from looped.config import Config
from looped.data.problems import prepare_task
from looped.errors import UserError
from looped.evaluation.solving import solved

SHARE_SOLVED = Gauge("solved", "share solved", " at the hardest trained difficulty", "share of problems solved",
                     higher_is_better=True, worst=0.0)
CHOOSING, REPORTED = slice(0, None, 2), slice(1, None, 2)
"""The half of the held-out problems that a best depth is chosen on, and the half that every figure is read from: the
best of several noisy figures is too good on the problems it was the best on."""


@dataclass(frozen=True)
class TaskMeasured(Measured):
    """One run: `right[difficulty][depth]` says which held-out problems are solved (1 or 0)."""

    gauge = SHARE_SOLVED
    right: dict[int, dict[int, Float[Tensor, "num"]]]

    def reported(self, difficulty: int, depth: int) -> Float[Tensor, "half"]:
        """Of the half that is reported."""
        return self.right[difficulty][depth][REPORTED]


class TaskMeasurer(Measurer):
    """Solves the same problems with every arm and seed."""

    keys = frozenset({"right"})

    def __init__(self, plan: Plan, finished: list[Place]):
        super().__init__(plan, finished)
        self.data = prepare_task(plan.config.task)
        self.levels = levels_of(plan.config)

    def inputs(self, place: Place) -> dict[str, Any]:
        return super().inputs(place) | {"levels": self.levels, "task": self.data.fingerprint}

    def evaluate(self, place: Place) -> dict[str, Any]:
        run = load(place)
        found = solved(run.objective, self.data, run.config, self.depths(place), self.levels)
        right = {str(difficulty): {str(depth): each.int().tolist() for depth, each in by_depth.items()}
                 for difficulty, by_depth in found.per_example.items()}
        return {"rows": [row.as_dict() for row in found.rows], "right": right}

    def made(self, found: Mapping[str, Any], **common) -> TaskMeasured:
        right = {int(difficulty): {int(depth): torch.tensor(each, dtype=torch.float64)
                                   for depth, each in by_depth.items()}
                 for difficulty, by_depth in found["right"].items()}
        return TaskMeasured(right=right, **common)


def levels_of(config: Config) -> list[int]:
    """The difficulties that are measured: the hardest trained one, and those of the config, else the task's own."""
    data = prepare_task(config.task)
    return sorted({data.train.high, *(config.evaluation.difficulties or data.task.tested)})


def check_task(plan: Plan) -> None:
    """Raises UserError where the task, its layout or a level is not to be had, or there are too few problems."""
    data = prepare_task(plan.config.task)
    for difficulty in levels_of(plan.config):
        data.heldout(1, difficulty)
    num = plan.config.evaluation.num_problems
    if num < 2:
        raise UserError(f"evaluation.num_problems {num} has no half to choose a depth on and another to report; set it "
                        f"to 2 or more")
