"""The table of a comparison on a task, a line an arm, with the notes under it."""

from collections.abc import Sequence

from looped.compare.cells import Table, closing_notes, cost_cells, difference_cell, mean_cell, over_seeds
from looped.compare.plan import Plan
from looped.compare.task_summary import Level, TaskSummary
from looped.data.problems import prepare_task

AT = {"trained": "trained depth", "best": "best depth", "deepest": "deepest"}
COSTS = ("seconds", "steps", "layer forwards", "peak MB")


def task_table(arms: Sequence[TaskSummary], plan: Plan) -> Table:
    """Four columns a difficulty, then the costs."""
    columns = [*AT.values(), f"against {arms[0].name}"]
    header = ["arm", *(f"{difficulty}: {column}" for difficulty in arms[0].levels for column in columns), *COSTS]
    return header, [_line(arm) for arm in arms]


def _line(arm: TaskSummary) -> list[str]:
    cells = [cell for level in arm.levels.values() for cell in _cells(level)]
    return [arm.name, *cells, *(cost_cells(arm)[name] for name in COSTS)]


def _cells(level: Level) -> list[str]:
    """`0.912 ± 0.013 (8)`, the depth in brackets."""
    return [*(f"{mean_cell(level.shares[level.at[at]])} ({level.at[at]})" for at in AT),
            difference_cell(level.difference)]


def task_notes(arms: Sequence[TaskSummary], plan: Plan) -> list[str]:
    """What the columns mean."""
    data, config = prepare_task(plan.config.task), plan.config
    low, high = data.train.low, data.train.high
    first, num = arms[0].runs[0], config.evaluation.num_problems
    depth = next(iter(first.right[high]))
    half = len(first.reported(high, depth))
    return [
        f"Share of held-out problems of {data.task.name} that are solved (higher is better), {over_seeds(plan)}. The "
        f"number before a colon is the difficulty ({data.task.difficulty}; trained from {low} to {high}), the one in "
        f"brackets the depth: loop steps, or solver steps of a denoiser.",
        f"trained depth: the mean trained one of a loop; 1 of a denoiser and of ar, which train one pass. deepest: the "
        f"most steps that were measured, of {', '.join(map(str, plan.depths))} and the trained depth.",
        f"best depth: chosen on one half of the {num} problems of a difficulty (those with even numbers), over all "
        f"seeds of an arm, the shallowest of equals. Every share in the table is of the other {half} problems, since "
        f"the best of several figures is too good on the problems it was chosen on.",
        f"against {arms[0].name}: the difference of the shares at each arm's own best depth, paired by problem and "
        f"seed; the 95 % interval is a bootstrap over problems of the mean over seeds, so it does not hold the spread "
        f"between seeds.",
        f"The curves over a budget, the table at equal budgets, and when an arm had another's final share, are of "
        f"metrics.jsonl: problems of difficulty {high} at the best of the depths "
        f"{', '.join(map(str, config.evaluation.depths))}, chosen on the problems that are reported, and so a little "
        f"too good.",
        *closing_notes(arms, plan),
    ]
