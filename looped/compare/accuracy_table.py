"""The table of fractions of right answers, one line per arm, with the notes below it."""

from collections.abc import Sequence

from looped.compare.accuracy_measure import ShareMeasured
from looped.compare.accuracy_summary import Level, ShareSummary
from looped.compare.plan import Plan
from looped.compare.table_cells import closing_notes, cost_cells, difference_cell, mean_cell, over_seeds
from looped.config import load_config
from looped.config.arms import OWN
from looped.reports.sections import Table
from looped.training.runs import CONFIG

AT = {"trained": "trained depth", "best": "best depth", "deepest": "deepest"}
TRIED = ("any trajectory", "layer forwards per answer")
COSTS = ("seconds", "steps", "layer forwards", "peak MB")


def share_table(arms: Sequence[ShareSummary], plan: Plan) -> Table:
    """Table with one line per arm: for each difficulty the fraction right at the trained, the best and the deepest
    depth, and the difference from the first arm; then the costs."""
    columns = [*AT.values(), f"against {arms[0].name}", *(TRIED if _several(arms) else ())]
    header = ["arm", *(column if difficulty is None else f"{difficulty}: {column}" for difficulty in arms[0].levels
                       for column in columns), *COSTS]
    return Table(header, [_line(arm, _several(arms)) for arm in arms])


def _several(arms: Sequence[ShareSummary]) -> bool:
    """True if an arm has several trajectories."""
    return any(level.tried is not None for arm in arms for level in arm.levels.values())


def _line(arm: ShareSummary, several: bool) -> list[str]:
    cells = [cell for level in arm.levels.values()
             for cell in (*_cells(level), *(_tried_cells(level) if several else ()))]
    return [arm.name, *cells, *(cost_cells(arm)[name] for name in COSTS)]


def _cells(level: Level) -> list[str]:
    """`0.912 ± 0.013 (8)`, the depth in brackets."""
    return [*(f"{mean_cell(level.shares[level.at[at]])} ({level.at[at]})" for at in AT),
            difference_cell(level.difference)]


def _tried_cells(level: Level) -> list[str]:
    """`0.912 ± 0.013 (of 4)`, and the layer forwards of an answer."""
    if level.tried is None:
        return ["-"] * len(TRIED)
    return [f"{mean_cell(level.tried.share)} (of {level.tried.trajectories})", f"{level.tried.layer_forwards:,.0f}"]


def share_notes(arms: Sequence[ShareSummary], plan: Plan, *, one: str, group: str, followed: str) -> list[str]:
    """Notes that explain the columns. `one`: problem or image; `group`: the set that a value averages over; `followed`:
    the set behind the training curves."""
    first, config = arms[0].runs[0], plan.config
    difficulty, by_depth = next(iter(first.right.items()))
    depth = next(iter(by_depth))
    num, half = len(by_depth[depth]), len(first.reported(difficulty, depth))
    return [
        f"trained depth: recurrence.mean of a loop; for a denoiser and ar, which are trained in one pass, one "
        f"step per block of the core. deepest: the largest measured depth, out of {', '.join(map(str, plan.depths))} "
        f"and the trained depth.",
        f"best depth: chosen on one half of the {num} {group} (those with even numbers), over all seeds of an arm; "
        f"ties go to the shallowest. All values in the table are computed on the other {half} {one}s, since the best "
        f"of several values is biased upwards on the {one}s it was chosen on.",
        *([f"any trajectory: the share of {one}s that any of an arm's trajectories solves (evaluation.trajectories), "
           f"at its best depth: the bound of choosing one of them. The layer forwards of an answer are those of all "
           f"trajectories."] if _several(arms) else []),
        f"against {arms[0].name}: the difference at each arm's own best depth, paired by {one} and seed; the 95 % "
        f"interval is a bootstrap over {one}s of the mean over seeds, so it does not include the spread between seeds.",
        f"The training curves, the tables of progress and at equal budgets, and the budget at which an arm reaches "
        f"another's final {first.gauge.name} use the evaluations in metrics.jsonl: {followed} at the best of the "
        f"depths {', '.join(map(str, config.evaluation.depths))}. That depth is chosen on the same {one}s, so these "
        f"values are slightly too good.",
        *([f"The evaluations during training of {', '.join(otherwise)} chose otherwise among trajectories than the "
           f"table."] if (otherwise := _measured_otherwise(arms)) else []),
        *closing_notes(arms, plan),
    ]


def _measured_otherwise(arms: Sequence[ShareSummary]) -> list[str]:
    """Arms with a run that was evaluated during training with other settings of its answers than now."""
    def changed(run: ShareMeasured) -> bool:
        path = run.place.run / CONFIG
        before = load_config(path) if path.is_file() else run.place.config
        return any(before.value(name) != run.place.config.value(name) for name in OWN)

    return [arm.name for arm in arms if any(map(changed, arm.runs))]


def image_notes(arms: Sequence[ShareSummary], plan: Plan) -> list[str]:
    """Notes of a comparison on images."""
    return [
        f"Accuracy: the fraction of held-out images ({plan.config.images.source}) that are classified correctly "
        f"(higher is better), {over_seeds(plan)}. The number in brackets is the depth: loop steps, or solver steps of "
        f"a denoiser.",
        *share_notes(arms, plan, one="image", group="held-out images", followed="all held-out images"),
    ]
