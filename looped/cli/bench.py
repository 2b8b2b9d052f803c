"""`looped bench`: measure the cost of training on this machine."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb, check_range, parse_depths
from looped.config import load_config
from looped.config.unread_settings import notice, notice_arms
from looped.errors import UserError


@dataclass
class Bench(Verb):
    """Measure the cost of training on this machine, with each arm in its own process and arms interleaved.

    step: seconds, saved activation bytes, peak memory and layer forwards of a training step under each objective.
    flops: FLOP/s of the model, compared with a matrix product.
    memory: bytes needed to train one block alone, compared with the same layers end to end.
    """

    what: Positional[Literal["step", "flops", "memory"]]
    """step, flops or memory"""
    model: Positional[Path | None] = None
    """the YAML file of the model"""
    config: Path | None = None
    """the same as a flag"""
    objectives: str = "full,truncated,denoise"
    """comma-separated arms of `step`; denoise:concat, :context and :paper are variants, settings of an arm follow it
    after spaces, and NAME=OBJECTIVE names it"""
    blocks: str = "1,2,4"
    """numbers of blocks for `memory`; 1 trains all layers end to end (ar)"""
    repeats: int = 5
    """timed steps per arm; the median is reported"""
    threads: int = 1
    """CPU threads"""
    device: str = "cpu"
    """cpu only: bench measures the time and memory of processes"""
    json: bool = False
    """print JSON instead of a table"""

    def __call__(self, settings: Settings) -> None:
        check_range("--repeats", self.repeats)
        check_range("--threads", self.threads)
        if self.device not in ("cpu", "auto"):
            raise UserError(f"--device {self.device} is not supported by bench, which measures the time and memory of "
                            f"CPU processes only; leave it out, and read seconds and peak_bytes in the metrics.jsonl "
                            f"of a run on that device")
        path = self.model or self.config
        if path is None or None not in (self.model, self.config):
            raise UserError(f"bench {self.what} needs one YAML file; write looped bench {self.what} CONFIG")
        config = load_config(path, settings, auto=False)
        from looped.config.arms import parse_arms, split_arms
        from looped.cost import bench_step, block_memory, mfu

        if self.what == "step":
            arms = parse_arms(config, self.objectives)
            for name in (name for arm in arms for name in arm.own if name.startswith("evaluation.")):
                raise UserError(f"{name} is for answers, and bench step times training; leave it out of the arms")
            notice_arms(arms, settings)
        else:
            notice(config, settings)
        if self.what == "memory":
            result = block_memory.bench_memory(config, parse_depths(self.blocks, "--blocks"), repeats=self.repeats,
                                               threads=self.threads)
            table = block_memory.format_memory
        elif self.what == "step":
            result, table = bench_step.bench_step(config, split_arms(self.objectives), repeats=self.repeats,
                                                  threads=self.threads), bench_step.format_step
        else:
            result, table = mfu.bench_flops(config, repeats=self.repeats, threads=self.threads), mfu.format_flops
        print(json.dumps(result, indent=1) if self.json else table(result))
