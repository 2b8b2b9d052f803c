"""What a comparison on images shows besides its table: accuracy over depth, and what the columns mean."""

from collections.abc import Sequence

from looped.compare.cells import over_seeds
from looped.compare.plan import Plan
from looped.compare.share_pictures import share_figure
from looped.compare.share_summary import ShareSummary
from looped.compare.share_table import share_notes
from looped.reports.sections import Figure


def image_figures(arms: Sequence[ShareSummary], plan: Plan) -> list[Figure]:
    """Accuracy over depth."""
    return [share_figure(arms, plan, None, name="depth", caption="Held-out accuracy by depth, after training")]


def image_notes(arms: Sequence[ShareSummary], plan: Plan) -> list[str]:
    """What the columns mean."""
    return [
        f"Accuracy: the share of held-out images ({plan.config.images.source}) that are named rightly (higher is "
        f"better), {over_seeds(plan)}. The number in brackets is the depth: loop steps, or solver steps of a denoiser.",
        *share_notes(arms, plan, one="image", group="held-out images", followed="all held-out images"),
    ]
