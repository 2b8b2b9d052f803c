"""`looped reproduce`: a published table with figures of one's own beside it."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb, no_settings, parse_depths
from looped.errors import UserError


@dataclass
class Reproduce(Verb):
    """Train and measure what a published table is of, and print it with the paper's figures beside; without a name,
    list the tables.

    A table is a YAML file of suites/. Each of its comparisons is a `looped compare` in a folder of its own. Leaves
    NAME.md and NAME.jsonl there. The same command again goes on; what is finished is not done again. Settings of
    `looped train` are for all arms.
    """

    name: Positional[str | None] = None
    """a suite, as masked_table3, or the path of a YAML file; all are listed if not given"""
    scale: str = "cpu"
    """the size: cpu, hours at most, or paper, the published one, on a GPU"""
    seeds: int | None = None
    """seeds 0, 1, ... of every arm; those of the suite, which are 3, if not given"""
    jobs: int = 2
    """runs at once; they should not have to share a processor"""
    arms: str | None = None
    """lines of the table, with commas; those of the scale if not given"""
    entries: str | None = None
    """sets of images or tasks, with commas; those of the scale if not given"""
    amount: int | None = None
    """how much of the budget every run gets; that of the suite if not given"""
    depths: str | None = None
    """depths that are measured, as 1,8,64; those of the suite if not given"""
    out: Path | None = None
    """the folder of all; runs/NAME-SCALE if not given"""

    def __call__(self, settings: Settings) -> int | None:
        if self.name is None:
            no_settings(settings, "reproduce without a name")
            print(listing())
            return None
        for name in ("seeds", "jobs", "amount"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name} {value} is not at least 1")
        depths = parse_depths(self.depths) if self.depths is not None else None
        from looped.reproduce.plan import Asked, Order
        from looped.reproduce.run import reproduce
        from looped.reproduce.suite import find_suite, load_suite

        path = find_suite(self.name)
        return reproduce(Order(path, load_suite(path), Asked(
            scale=self.scale, out=self.out, seeds=self.seeds, jobs=self.jobs, arms=self.arms, entries=self.entries,
            amount=self.amount, depths=depths, settings=settings)))


def listing() -> str:
    """The suites: what they reproduce, and how long that takes at every scale."""
    from looped.reproduce.suite import known_suites, load_suite

    lines = []
    for name, path in known_suites().items():
        suite = load_suite(path)
        sizes = "; ".join(f"--scale {scale}: {size.time}" for scale, size in suite.scales.items())
        lines.append(f"{name}\n  {suite.title}\n  {suite.reproduces}\n  {sizes}")
    return "\n".join(lines)
