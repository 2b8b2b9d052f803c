"""`looped bench`: the cost of training on this machine."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb, check_range, parse_depths
from looped.config import load_config
from looped.config.reads import notice, notice_arms
from looped.errors import UserError


@dataclass
class Bench(Verb):
    """Measure cost on this machine, each arm in a process of its own, interleaved.

    step: seconds, saved activation bytes, peak memory and layer forwards of a training step under each objective.
    flops: floating-point operations a second of the model beside those of a matrix product.
    memory: bytes that one of several blocks alone takes to train, beside the same layers end to end.
    """

    what: Positional[Literal["step", "flops", "memory"]]
    """step, flops or memory"""
    model: Positional[Path | None] = None
    """the YAML file of the model"""
    config: Path | None = None
    """the same as a flag"""
    objectives: str = "full,truncated,denoise"
    """arms of `step`; denoise:concat, :context, :paper are variants, settings follow after spaces, NAME=OBJECTIVE names
    an arm"""
    blocks: str = "1,2,4"
    """numbers of blocks of `memory`; 1 is all layers end to end (ar)"""
    repeats: int = 5
    """timed steps an arm; the median counts"""
    threads: int = 1
    """CPU threads"""
    device: str = "cpu"
    """the processor alone: what is measured are processes, their time and their memory"""
    json: bool = False
    """print JSON instead of a table"""

    def __call__(self, settings: Settings) -> None:
        check_range("--repeats", self.repeats)
        check_range("--threads", self.threads)
        if self.device not in ("cpu", "auto"):
            raise UserError(f"--device {self.device} is not for bench, which reads the time and the memory of "
                            f"processes and sees nothing of what another device does; leave it out, and read seconds "
                            f"and peak_bytes in the metrics.jsonl of a run there")
        path = self.model or self.config
        if path is None or None not in (self.model, self.config):
            raise UserError(f"bench {self.what} needs one YAML file; write looped bench {self.what} CONFIG")
        config = load_config(path, settings)
        from looped.config.arms import parse_arms, split_arms
        from looped.cost import memory, speed, step

        if self.what == "step":
            notice_arms(parse_arms(config, self.objectives), settings)
        else:
            notice(config, settings)
        if self.what == "memory":
            result, table = memory.bench_memory(config, parse_depths(self.blocks, "--blocks"), repeats=self.repeats,
                                                threads=self.threads), memory.format_memory
        elif self.what == "step":
            result, table = step.bench_step(config, split_arms(self.objectives), repeats=self.repeats,
                                            threads=self.threads), step.format_step
        else:
            result, table = speed.bench_flops(config, repeats=self.repeats, threads=self.threads), speed.format_flops
        print(json.dumps(result, indent=1) if self.json else table(result))
