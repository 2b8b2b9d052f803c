"""`looped compare`: compare several objectives at one budget over seeds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb, check_range, parse_depths, parse_levels
from looped.config import load_config
from looped.config.unread_settings import notice_arms
from looped.errors import UserError


@dataclass
class Compare(Verb):
    """Train several objectives at one budget over several seeds, measure them on the same text (or the same problems of
    a task, or the same images), and write a report.

    Each run has its own process. Writes a table (compare.md), rows (compare.jsonl), plots/*.png and a self-contained
    page (report.html). The same command resumes an interrupted comparison and skips finished runs.
    """

    config: Positional[Path]
    """the YAML file on which all arms are based"""
    budget: Literal["tokens", "layer-forwards", "seconds"]
    """the unit of the budget, which is the same for every arm"""
    objectives: str = "ar,truncated,denoise"
    """comma-separated arms, of which the first is the reference; settings of an arm follow it after spaces,
    denoise:concat, :context and :paper are variants, and NAME=OBJECTIVE names the arm in tables and files:
    "truncated,denoise,gated=denoise model.injection=gated" """
    amount: int | None = None
    """amount of the budget; if not given, training.budget, if it has the same unit"""
    seeds: int = 3
    """seeds 0, 1, ..."""
    jobs: int = 1
    """runs at a time; with a budget in seconds they should not share a processor"""
    depths: str | None = None
    """loop or solver steps to measure; if not given, 1, recurrence.mean, and four times that"""
    difficulties: str | None = None
    """tasks: difficulties to measure in addition to the hardest trained one, e.g. 16,32,64; if not given,
    evaluation.difficulties, or the task's own"""
    device: str = "auto"
    """device for measuring the trained runs: auto (the best available of cuda, mps, cpu), cpu, cuda, cuda:1 or mps;
    training always uses the best available"""
    dtype: str = "fp32"
    """number format for measuring the trained runs: fp32, or bf16 or fp16 under autocast"""
    out: Path | None = None
    """the folder of the comparison; if not given, runs/compare-<name of the config>"""

    def __call__(self, settings: Settings) -> int:
        for name in ("seeds", "jobs"):
            check_range(f"--{name}", getattr(self, name))
        if self.amount is not None and self.amount < 1:
            raise UserError(f"--amount {self.amount} is not at least 1")
        depths = parse_depths(self.depths) if self.depths is not None else None
        config = load_config(self.config, settings, auto=False)
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
