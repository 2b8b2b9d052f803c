"""Table of comparisons by kind of data (text, tasks, images): how each is measured, tabulated and plotted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from looped.compare.accuracy_summary import summarise_shares
from looped.compare.accuracy_table import image_notes, share_table
from looped.compare.classify_measure import ImageMeasurer, check_images
from looped.compare.compute_to_target import Reach, reaches, with_reverse
from looped.compare.custom_domain_measure import own_measurer, own_notes
from looped.compare.image_generation_measure import GeneratedImageMeasurer, made_notes, made_table
from looped.compare.measure import Measured, Measurer
from looped.compare.plan import Plan
from looped.compare.plots import over_depths
from looped.compare.summary import ArmSummary, summarise_means
from looped.compare.task_measure import TaskMeasurer, check_task
from looped.compare.task_plots import task_figures, task_notes
from looped.compare.text_measure import TextMeasurer
from looped.compare.text_summary import summarise_texts
from looped.compare.text_table import text_notes, text_samples, text_table
from looped.config import Config
from looped.domains import domain_of
from looped.reports.sections import Section, Table

Arms = Sequence[ArmSummary]


@dataclass(frozen=True)
class Kind:
    """One kind of comparison. `held_out`: noun for the data that all arms are measured on. `check`: raises UserError
    for an impossible plan before anything is trained. `depths`: plots over depth. `samples`: sections with generated
    samples and their metrics."""

    held_out: str
    check: Callable[[Plan], None]
    measurer: type[Measurer]
    summarise: Callable[[Sequence[Measured]], Arms]
    reaches: Callable[[Arms], list[Reach]]
    table: Callable[[Arms, Plan], Table]
    notes: Callable[[Arms, Plan], list[str]]
    depths: Callable[[Arms, Plan], list[Section]]
    samples: Callable[[Arms], list[Section]] = lambda arms: []


TEXT = Kind("text", lambda plan: None, TextMeasurer, summarise_texts, reaches, text_table, text_notes,
            over_depths("Held-out loss by depth, after training"), text_samples)
TASK = Kind("problems", check_task, TaskMeasurer, summarise_shares, lambda arms: with_reverse(reaches(arms), arms),
            share_table, task_notes, task_figures)
IMAGES = replace(TASK, held_out="images", check=check_images, measurer=ImageMeasurer, notes=image_notes,
                 depths=over_depths("Held-out accuracy by depth, after training"))
MADE = Kind("images", check_images, GeneratedImageMeasurer, summarise_means, reaches, made_table, made_notes,
            over_depths("Fréchet distance to held-out images by solver steps, after training"))

KINDS = {"text": TEXT, "puzzles": TASK, "classify": IMAGES, "generate": MADE}


def kind_of(config: Config) -> Kind:
    """The kind of comparison for the data of a config; for a custom domain that writes no text, built from that domain.
    """
    if config.kind.writes:
        return TEXT
    if config.domain.name is not None:
        return replace(IMAGES, held_out=domain_of(config).examples, check=lambda plan: None,
                       measurer=own_measurer(config), notes=own_notes)
    return KINDS[config.kind.name]
