"""The table of shares of right answers, a line an arm, with the notes under it."""

from collections.abc import Sequence

from looped.compare.cells import closing_notes, cost_cells, difference_cell, mean_cell, over_seeds
from looped.compare.plan import Plan
from looped.compare.share_summary import Level, ShareSummary
from looped.reports.sections import Table

AT = {"trained": "trained depth", "best": "best depth", "deepest": "deepest"}
COSTS = ("seconds", "steps", "layer forwards", "peak MB")


def share_table(arms: Sequence[ShareSummary], plan: Plan) -> Table:
    """Four columns a difficulty, then the costs."""
    columns = [*AT.values(), f"against {arms[0].name}"]
    header = ["arm", *(column if difficulty is None else f"{difficulty}: {column}" for difficulty in arms[0].levels
                       for column in columns), *COSTS]
    return Table(header, [_line(arm) for arm in arms])


def _line(arm: ShareSummary) -> list[str]:
    cells = [cell for level in arm.levels.values() for cell in _cells(level)]
    return [arm.name, *cells, *(cost_cells(arm)[name] for name in COSTS)]


def _cells(level: Level) -> list[str]:
    """`0.912 ± 0.013 (8)`, the depth in brackets."""
    return [*(f"{mean_cell(level.shares[level.at[at]])} ({level.at[at]})" for at in AT),
            difference_cell(level.difference)]


def share_notes(arms: Sequence[ShareSummary], plan: Plan, *, one: str, group: str, followed: str) -> list[str]:
    """What the columns mean. `one`: problem or image; `group`: what a share is of; `followed`: what the curves of
    training are of."""
    first, config = arms[0].runs[0], plan.config
    difficulty, by_depth = next(iter(first.right.items()))
    depth = next(iter(by_depth))
    num, half = len(by_depth[depth]), len(first.reported(difficulty, depth))
    return [
        f"trained depth: the mean trained one of a loop; of a denoiser and of ar, which train one pass, a step for "
        f"each block of the core. deepest: the most steps that were measured, of {', '.join(map(str, plan.depths))} "
        f"and the trained depth.",
        f"best depth: chosen on one half of the {num} {group} (those with even numbers), over all seeds of an arm, the "
        f"shallowest of equals. Every share in the table is of the other {half} {one}s, since the best of several "
        f"figures is too good on the {one}s it was chosen on.",
        f"against {arms[0].name}: the difference of the shares at each arm's own best depth, paired by {one} and seed; "
        f"the 95 % interval is a bootstrap over {one}s of the mean over seeds, so it does not hold the spread between "
        f"seeds.",
        f"The curves over a budget, the table at equal budgets, and when an arm had another's final "
        f"{first.gauge.name}, are of metrics.jsonl: {followed} at the best of the depths "
        f"{', '.join(map(str, config.evaluation.depths))}, chosen on the {one}s that are reported, and so a little too "
        f"good.",
        *closing_notes(arms, plan),
    ]


def image_notes(arms: Sequence[ShareSummary], plan: Plan) -> list[str]:
    """The same of images."""
    return [
        f"Accuracy: the share of held-out images ({plan.config.images.source}) that are named rightly (higher is "
        f"better), {over_seeds(plan)}. The number in brackets is the depth: loop steps, or solver steps of a denoiser.",
        *share_notes(arms, plan, one="image", group="held-out images", followed="all held-out images"),
    ]
