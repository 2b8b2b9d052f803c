"""`looped reproduce`: reproduce a published table, with the published values alongside."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb, no_settings, parse_depths
from looped.errors import UserError


@dataclass
class Reproduce(Verb):
    """Train and measure the arms of a published table, and print the results next to the published values; without a
    name, list the tables.

    A table is a YAML file in suites/. Each of its comparisons is a `looped compare` in its own folder. Writes NAME.md
    and NAME.jsonl. The same command resumes an interrupted run and skips finished parts. Settings of `looped train`
    apply to all arms.
    """

    name: Positional[str | None] = None
    """a suite, e.g. masked_table3, or the path of a YAML file; if not given, all are listed"""
    scale: str = "cpu"
    """size of the experiment: cpu (hours at most) or paper (the published size, on a GPU)"""
    seeds: int | None = None
    """seeds 0, 1, ... per arm; if not given, those of the suite (3)"""
    jobs: int = 2
    """runs at a time; they should not share a processor"""
    arms: str | None = None
    """comma-separated lines of the table; if not given, those of the scale"""
    entries: str | None = None
    """comma-separated data sets or tasks; if not given, those of the scale"""
    amount: int | None = None
    """training budget of a run, in the unit of the suite; if not given, that of the suite"""
    depths: str | None = None
    """depths to measure, e.g. 1,8,64; if not given, those of the suite"""
    out: Path | None = None
    """folder for all files; if not given, runs/NAME-SCALE"""

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
    """The list of suites, with the table each reproduces and its run time at every scale."""
    from looped.reproduce.suite import known_suites, load_suite

    lines = []
    for name, path in known_suites().items():
        suite = load_suite(path)
        sizes = "; ".join(f"--scale {scale}: {size.time}" for scale, size in suite.scales.items())
        lines.append(f"{name}\n  {suite.title}\n  {suite.reproduces}\n  {sizes}")
    return "\n".join(lines)
