"""`looped train`: train a config in a run folder, or print the cost of that."""

import os
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb, costs_of
from looped.config import Config, dump_config, load_config
from looped.config.unread_settings import notice, unread_in_file
from looped.errors import UserError


@dataclass
class Train(Verb):
    """Train a config in a run folder. The same command resumes an interrupted run.

    The folder holds config.yaml, metrics.jsonl, train.log, the tokenizer and the checkpoints. Ctrl-C saves and stops.
    """

    config: Positional[Path]
    """a YAML file, the name of a shipped config (see looped configs), or the config.yaml of a run"""
    run: Path | None = None
    """the run's folder; if not given, runs/<name of the config>, with the suffix -block0 etc. for a single block"""
    block: str | None = None
    """hold and train only this block of a core of several, 0, 1, ...; rank: each process started by torchrun or
    accelerate trains the block of its rank, in its own run (with --run RUN: RUN-block0 etc.)"""
    dry_run: bool = False
    """only print the resolved config and its parameters, FLOPs and memory"""

    def __call__(self, settings: Settings) -> int:
        if self.block is not None:
            settings = dict(settings) | {"blocks.alone": str(self._alone(settings))}
        config = load_config(self.config, settings)
        notice(config, settings)
        if self.dry_run:
            print(dump_config(config))
            print(costs_of(config), *unread_in_file(config, settings), sep="\n")
            _print_cautions(config)
            return 0
        if "WORLD_SIZE" in os.environ:  # torch's C++ library prints its stack if a process is lost, beside our sentence
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from looped.training.train import train

        return train(config, self._folder(config)).exit_code

    def _alone(self, settings: Settings) -> int:
        """The block that --block names. Raises UserError."""
        if "blocks.alone" in settings:
            raise UserError(f"--block {self.block} and --blocks.alone {settings['blocks.alone']} set the same value; "
                            f"keep one of them")
        if self.block == "rank":
            from looped.training.processes import leave_group

            return leave_group(load_config(self.config, settings).blocks.num)
        try:
            return int(str(self.block))
        except ValueError:
            raise UserError(f"--block {self.block} is neither the number of a block nor rank; write for instance "
                            f"--block 0") from None

    def _folder(self, config: Config) -> Path:
        """The folder of the run."""
        name = "" if config.blocks.alone is None else f"-block{config.blocks.alone}"
        if self.run is not None:
            return self.run.with_name(self.run.name + name) if self.block == "rank" else self.run
        if not (self.config.parent / "stamp.json").exists():
            return Path("runs") / (self.config.stem + name)
        if load_config(self.config).blocks.alone == config.blocks.alone:  # the config of a run: resume that run
            return self.config.parent
        return self.config.parent.with_name(self.config.parent.name + name)


def _print_cautions(config: Config) -> None:
    """Print the warnings about the loop that training would print at its start."""
    from looped.objectives.degenerate_loops import cautions

    for caution in cautions(config):
        print(f"warning: {caution}")
