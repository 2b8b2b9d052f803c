"""`looped compare`: several objectives at one budget over seeds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb, check_range, parse_depths, parse_levels
from looped.config import load_config
from looped.config.reads import notice_arms
from looped.errors import UserError


@dataclass
class Compare(Verb):
    """Train several objectives at one budget over several seeds, measure them on the same text (or the same problems of
    a task, or the same images), and write a report.

    Each run has a process of its own. Leaves a table (compare.md), rows (compare.jsonl), plots/*.png and a page that
    holds everything (report.html). The same command again goes on; what is finished is not done again.
    """

    config: Positional[Path]
    """the YAML file that all arms start from"""
    budget: Literal["tokens", "layer-forwards", "seconds"]
    """what every arm gets the same amount of"""
    objectives: str = "ar,truncated,denoise"
    """arms, the first is what the others are held against; settings of one follow it after spaces, denoise:concat,
    :context, :paper are variants, and NAME=OBJECTIVE gives an arm the name that tables and files have for it:
    "truncated,denoise,gated=denoise model.injection=gated" """
    amount: int | None = None
    """how much of the budget; training.budget if that is counted in the same unit"""
    seeds: int = 3
    """seeds 0, 1, ..."""
    jobs: int = 1
    """runs at once; with a budget in seconds they should not have to share a processor"""
    depths: str | None = None
    """loop or solver steps to measure; 1, the mean trained depth and four times that if not given"""
    difficulties: str | None = None
    """of a task: the levels to measure besides the hardest trained one, as 16,32,64; those of evaluation.difficulties,
    or the task's own, if not given"""
    device: str = "auto"
    """the device that the trained runs are measured on: auto (the best there is: cuda, mps, cpu), cpu, cuda, cuda:1 or
    mps; training has the best there is"""
    dtype: str = "fp32"
    """their number format while they are measured: fp32, or bf16 or fp16 under autocast"""
    out: Path | None = None
    """the folder of the comparison; runs/compare-<name of the config> if not given"""

    def __call__(self, settings: Settings) -> int:
        for name in ("seeds", "jobs"):
            check_range(f"--{name}", getattr(self, name))
        if self.amount is not None and self.amount < 1:
            raise UserError(f"--amount {self.amount} is not at least 1")
        depths = parse_depths(self.depths) if self.depths is not None else None
        config = load_config(self.config, settings)
        if self.difficulties is not None:
            from looped.domains import domain_of

            domain_of(config).check(config, ["difficulties"], self.config)
            config = config.replace(**{"evaluation.difficulties": parse_levels(self.difficulties)})
        from looped.compare import compare, make_plan
        from looped.devices import Placement

        placement = Placement.of(self.device, self.dtype)
        plan = make_plan(config, self.objectives, budget=(self.budget, self.amount), num_seeds=self.seeds,
                         depths=depths, out=self.out or Path("runs") / f"compare-{self.config.stem}")
        notice_arms(plan.arms, settings)
        return compare(plan, jobs=self.jobs, placement=placement)
