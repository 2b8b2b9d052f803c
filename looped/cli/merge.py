"""`looped merge`: merge runs of single blocks into one run of the whole model."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb, no_settings


@dataclass
class Merge(Verb):
    """Merge finished runs of single blocks into one run of the whole model, which eval and generate can use.

    Each block must be given exactly once, all from the same config and data, and the weights that blocks share must be
    bitwise equal.
    """

    runs: Positional[tuple[Path, ...]]
    """folders of runs of `looped train --block`, in any order"""
    out: Path
    """the folder of the whole run, which must not exist"""

    def __call__(self, settings: Settings) -> None:
        no_settings(settings, "merge")
        from looped.training.merge import merge

        print(merge(self.runs, self.out))
