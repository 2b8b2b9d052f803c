"""Figures of an arm on a task or on images over its seeds: the share of right answers at each difficulty, at the depths
that stand for it. Images have one difficulty, None.

The best depth is chosen on one half of what is held out, all seeds together; every share is of the other half.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from looped.compare.share_measure import CHOOSING, ShareMeasured
from looped.compare.summary import ArmSummary, Difference, Spread, by_arm, difference, spread


@dataclass(frozen=True)
class Level:
    """One arm at one difficulty. `at`: which depth (`trained`, `best`, `deepest`) -> its number; `shares` by depth;
    `difference` of the best depths, to the first arm."""

    difficulty: int | None
    at: dict[str, int]
    shares: dict[int, Spread]
    difference: Difference | None


@dataclass(frozen=True)
class ShareSummary(ArmSummary):
    """One arm over its finished seeds; `levels` by difficulty."""

    runs: list[ShareMeasured]
    levels: dict[int | None, Level]

    def seeds_by_depth(self, difficulty: int | None = None) -> dict[int, list[float]]:
        return {depth: [run.reported(difficulty, depth).mean().item() for run in self.runs]
                for depth in self.levels[difficulty].shares}

    def rows(self) -> list[dict[str, Any]]:
        """The shares of the table, and the differences."""
        return [row for level in self.levels.values() for row in _rows(level)]


def _rows(level: Level) -> list[dict[str, Any]]:
    rows = [{"kind": "share", "difficulty": level.difficulty, "at": at, "depth": depth, **asdict(level.shares[depth])}
            for at, depth in level.at.items()]
    if level.difference is not None:
        rows.append({"kind": "difference", "difficulty": level.difficulty, **asdict(level.difference)})
    return rows


def summarise_shares(measured: Sequence[ShareMeasured]) -> list[ShareSummary]:
    """Arms in their order; differences are to the first."""
    groups = by_arm(measured)
    first = next(iter(groups.values()), [])
    return [ShareSummary(name, runs, {difficulty: _level(difficulty, runs, first) for difficulty in runs[0].right})
            for name, runs in groups.items()]


def _level(difficulty: int | None, runs: list[ShareMeasured], first: list[ShareMeasured]) -> Level:
    depths, best = depths_of(runs, difficulty), best_depth(runs, difficulty)
    shares = {depth: spread([run.reported(difficulty, depth).mean().item() for run in runs]) for depth in depths}
    at = {"trained": runs[0].place.config.main_depth, "best": best, "deepest": depths[-1]}
    return Level(difficulty, at, shares, None if runs is first else _difference(difficulty, runs, first))


def depths_of(runs: Sequence[ShareMeasured], difficulty: int | None) -> list[int]:
    """Where every run was measured."""
    return sorted(set.intersection(*(set(run.right[difficulty]) for run in runs)))


def best_depth(runs: Sequence[ShareMeasured], difficulty: int | None) -> int:
    """Where most of the choosing half is right, over all seeds; the shallowest of equals."""
    def share(depth: int) -> float:
        return torch.stack([run.right[difficulty][depth][CHOOSING] for run in runs]).mean().item()

    return max(depths_of(runs, difficulty), key=share)


def _difference(difficulty: int | None, runs: list[ShareMeasured], first: list[ShareMeasured]) -> Difference | None:
    """Each arm at its own best depth."""
    mine, theirs = best_depth(runs, difficulty), best_depth(first, difficulty)
    return difference(runs, first, lambda run: run.reported(difficulty, mine),
                      lambda other: other.reported(difficulty, theirs))
