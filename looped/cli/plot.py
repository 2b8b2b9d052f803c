"""`looped plot`: depth curves of several runs in one picture."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb, no_settings
from looped.errors import UserError


@dataclass
class Plot(Verb):
    """Draw the depth curves of evaluated runs in one picture, the trained depths shaded, and print them as a table.

    Each difficulty of a task has a curve of its own, and so has each checkpoint or setting that was evaluated.
    """

    runs: Positional[tuple[Path, ...]]
    """folders of runs that `looped eval` has measured"""
    out: Path = Path("depth.png")
    """the picture: PNG, SVG or PDF; the table is written beside it as Markdown"""
    metric: str | None = None
    """what to draw: any figure of eval/depth.jsonl with a depth, or a noise level; nats_per_token of text, solved of a
    task, accuracy or frechet_distance of images if not given"""

    def __call__(self, settings: Settings) -> None:
        no_settings(settings, "plot")
        if not self.runs:
            raise UserError("plot needs the folder of at least one run; see looped plot --help")
        from looped.reports.runs import plot_runs

        print(plot_runs(self.runs, self.out, metric=self.metric))
        print(f"\n{self.out}")
