"""`looped prepare`: tokenize the text of a config ahead of training."""

import time
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb
from looped.config import load_config
from looped.config.unread_settings import notice


@dataclass
class Prepare(Verb):
    """Tokenize the text of a config, so that training starts at once. Interrupted, the same command goes on from the
    pieces that are done; once all is there, it says so.

    Training does the same where it has not been done. Memory does not grow with the text.
    """

    config: Positional[Path]
    """a YAML file, the name of a shipped config (see looped configs), or the config.yaml of a run"""

    def __call__(self, settings: Settings) -> None:
        config = load_config(self.config, settings)
        notice(config, settings)
        from looped.data.from_config import find_data, located
        from looped.training.runs import started_in

        begun = time.perf_counter()
        said = find_data(located(config, started_in(self.config.parent))).prepare()
        print(f"{said}; {time.perf_counter() - begun:.2f} s")
