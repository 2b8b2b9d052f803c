"""`looped train`: a config trained in a run folder, or what that would cost; what is heavy is imported in place."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb, costs_of
from looped.config import Config, dump_config, load_config
from looped.config.reads import notice, unread_in
from looped.errors import UserError


@dataclass
class Train(Verb):
    """Train a config in a run folder, or go on with a run that was interrupted: run the same command again.

    The folder holds config.yaml, metrics.jsonl, train.log, the tokenizer and the checkpoints. Ctrl-C saves and stops.
    """

    config: Positional[Path]
    """a YAML file, the name of a config that comes with looped (see looped configs), or the config.yaml of a run"""
    run: Path | None = None
    """the run's folder; runs/<name of the config> if not given, with -block0 and so on of a block alone"""
    block: str | None = None
    """hold and train this block of a core of several alone, 0 or 1 and so on; rank: each process that torchrun or
    accelerate starts takes the block of its rank, in a run of its own (with --run RUN in RUN-block0 and so on)"""
    dry_run: bool = False
    """only print the resolved config, the parameters, the FLOPs and the memory it would need"""

    def __call__(self, settings: Settings) -> int:
        if self.block is not None:
            settings = dict(settings) | {"blocks.alone": str(self._alone(settings))}
        config = load_config(self.config, settings)
        notice(config, settings)
        if self.dry_run:
            print(dump_config(config))
            print(costs_of(config), *unread_in(load_config(self.config), config, settings), sep="\n")
            _print_cautions(config)
            return 0
        from looped.training.train import train

        return train(config, self._folder(config)).exit_code

    def _alone(self, settings: Settings) -> int:
        """The block that --block names. Raises UserError."""
        if "blocks.alone" in settings:
            raise UserError(f"--block {self.block} and --blocks.alone {settings['blocks.alone']} say the same; keep "
                            f"one of them")
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
        if load_config(self.config).blocks.alone == config.blocks.alone:  # the config of a run: that run
            return self.config.parent
        return self.config.parent.with_name(self.config.parent.name + name)


def _print_cautions(config: Config) -> None:
    """The warnings on its loop that a run of the config begins with."""
    from looped.objectives.state_norm import cautions

    for caution in cautions(config):
        print(f"warning: {caution}")
