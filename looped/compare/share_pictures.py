"""Shares of right answers over depth, drawn."""

from collections.abc import Sequence

from looped.compare.pictures import band_note, picture, plot_depths
from looped.compare.plan import Plan
from looped.compare.share_summary import ShareSummary
from looped.reports.sections import Figure


def share_figure(arms: Sequence[ShareSummary], plan: Plan, difficulty: int | None, *, name: str, caption: str,
                 title: str = "") -> Figure:
    """The share at one difficulty over depth, a line an arm, in the file of that name."""
    path = picture(plan.out, name)
    plot_depths(arms, lambda arm: shares_by_depth(arm, difficulty), path, title=title)
    return Figure(path, f"{caption}.{band_note(plan)}", caption)


def shares_by_depth(arm: ShareSummary, difficulty: int | None) -> dict[int, list[float]]:
    """Depth -> the share of each seed."""
    return {depth: [run.reported(difficulty, depth).mean().item() for run in arm.runs]
            for depth in arm.levels[difficulty].shares}
