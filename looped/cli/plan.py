"""`looped plan`: memory, bytes sent, hours and checkpoints of a run on several devices, before it is run."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb
from looped.config import load_config
from looped.config.unread_settings import notice
from looped.errors import UserError


@dataclass
class Plan(Verb):
    """Plan a run on several devices: memory of each process, the largest micro-batch that fits, bytes sent per step,
    steps, hours and the size of a checkpoint. Nothing is trained: FLOPs and bytes are counted on tensors without
    values.
    """

    config: Positional[Path]
    """a YAML file, the name of a shipped config (see looped configs), or the config.yaml of a run"""
    devices: int = 1
    """devices, with one process each"""
    memory: str | None = None
    """memory of a device, such as 80GB; without it no largest micro-batch is given"""
    flops: float | None = None
    """peak FLOP/s of a device in the precision of training, such as 989e12; without it no time is given"""
    utilisation: float = 0.4
    """fraction of the peak that training reaches; measure it with looped bench flops, or scripts/gpu_check.py"""
    disk: str | None = None
    """bytes per second that the disk of the run writes, such as 1GB; without it no time of a checkpoint is given"""

    def __call__(self, settings: Settings) -> None:
        if self.devices < 1:
            raise UserError(f"--devices {self.devices} is not a number of devices; write 1 or more")
        if not 0 < self.utilisation <= 1:
            raise UserError(f"--utilisation {self.utilisation} is not between 0 and 1; give a fraction such as 0.4")
        if self.flops is not None and not self.flops > 0:
            raise UserError(f"--flops {self.flops} is not a speed; write for instance 989e12")
        config = load_config(self.config, settings)
        notice(config, settings)
        from looped.cost.plan import bytes_of, format_plan, plan
        from looped.data.from_config import vocab_size_of

        print(format_plan(plan(config, vocab_size_of(config), devices=self.devices,
                               limit=None if self.memory is None else bytes_of(self.memory, "--memory"),
                               flops=None if self.flops is None else self.flops * self.utilisation,
                               disk=None if self.disk is None else bytes_of(self.disk, "--disk"))))
