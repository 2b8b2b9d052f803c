"""`looped plot`: plot the depth curves of several runs together."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb, no_settings
from looped.errors import UserError


@dataclass
class Plot(Verb):
    """Plot the depth curves of evaluated runs together, the trained depths shaded, and print them as a table.

    Each difficulty of a task, each evaluated checkpoint and each changed setting has its own curve.
    """

    runs: Positional[tuple[Path, ...]]
    """folders of runs evaluated with `looped eval`"""
    out: Path = Path("depth.png")
    """file of the plot: PNG, SVG or PDF; the table is written next to it as Markdown"""
    metric: str | None = None
    """any metric of eval/depth.jsonl with a depth or a noise level; if not given, nats_per_token for text, solved for a
    task, accuracy or frechet_distance for images"""

    def __call__(self, settings: Settings) -> None:
        no_settings(settings, "plot")
        if not self.runs:
            raise UserError("plot needs the folder of at least one run; see looped plot --help")
        from looped.reports.runs import plot_runs

        print(plot_runs(self.runs, self.out, metric=self.metric))
        print(f"\n{self.out}")
