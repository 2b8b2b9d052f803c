"""Table cells that all kinds of comparison share, and the notes that explain the cost columns."""

import math
from collections.abc import Mapping, Sequence

from looped.compare.plan import Plan
from looped.compare.summary import ArmSummary, Difference, Spread


def mean_cell(value: Spread | None) -> str:
    """`3.616 ± 0.021`."""
    if value is None:
        return "-"
    return f"{value.mean:.3f}" + ("" if math.isnan(value.sd) else f" ± {value.sd:.3f}")


def difference_cell(value: Difference | None) -> str:
    """`-0.120 [-0.180, -0.060]`."""
    return "-" if value is None else f"{value.mean:+.3f} [{value.ci_low:+.3f}, {value.ci_high:+.3f}]"


def cost_cells(arm: ArmSummary) -> Mapping[str, str]:
    """Column -> cell: the cost of training one run."""
    c = arm.costs
    return {"seconds": f"{c['seconds'].mean:,.1f}", "steps": f"{c['step'].mean:,.0f}",
            "tokens": f"{c['tokens'].mean:,.0f}", "layer forwards": f"{c['layer_forwards'].mean:,.0f}",
            "peak MB": f"{c['peak_bytes'].mean / 1e6:,.0f}"}


def over_seeds(plan: Plan) -> str:
    """Description of how a cell averages over seeds."""
    return "one seed" if plan.num_seeds == 1 else f"mean ± standard deviation over {plan.num_seeds} seeds"


def closing_notes(arms: Sequence[ArmSummary], plan: Plan) -> list[str]:
    """Notes that explain the cost columns and name the arms with missing seeds."""
    found = ["seconds, steps, tokens, layer forwards (a backward pass counts as two), peak MB: cost of training only, "
             "mean over seeds."]
    if plan.config.training.clock == "processor":
        found.append("Seconds are processor time summed over all threads (training.clock), not wall-clock time.")
    unfinished = [arm.name for arm in arms if len(arm.runs) < plan.num_seeds]
    return found + ([f"Arms with unfinished seeds: {', '.join(unfinished)}."] if unfinished else [])
