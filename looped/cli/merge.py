"""`looped merge`: runs of single blocks as one run of the whole model."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb, no_settings


@dataclass
class Merge(Verb):
    """Put finished runs of single blocks together into the run of the whole model, which eval and generate can use.

    Every block must be there once, from the same config and data, and what the blocks share must be bitwise the same.
    """

    runs: Positional[tuple[Path, ...]]
    """folders of runs of `looped train --block`, in any order"""
    out: Path
    """the folder of the whole run, which must not exist"""

    def __call__(self, settings: Settings) -> None:
        no_settings(settings, "merge")
        from looped.training.merge import merge

        print(merge(self.runs, self.out))
