"""Summary of an arm over its seeds on a task or on images: the fraction of right answers at each difficulty, at the
trained, best and deepest depth. Images have a single difficulty, None.

The best depth is chosen on one half of the held-out examples, over all seeds; all values are of the other half.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch

from looped.compare.accuracy_measure import CHOOSING, REPORTED, ShareMeasured
from looped.compare.summary import ArmSummary, Difference, Spread, by_arm, difference, spread


@dataclass(frozen=True)
class Tried:
    """Several trajectories at the best depth: their number, the share of problems that any of them solves (pass@k), and
    the layer forwards of an answer, over all of them."""

    depth: int
    trajectories: int
    share: Spread
    layer_forwards: float


@dataclass(frozen=True)
class Level:
    """One arm at one difficulty. `at`: `trained`, `best` or `deepest` -> depth; `shares`: depth -> fraction right;
    `difference`: to the first arm, each at its own best depth. `tried`: of several trajectories."""

    difficulty: int | None
    at: dict[str, int]
    shares: dict[int, Spread]
    difference: Difference | None
    tried: "Tried | None" = None


@dataclass(frozen=True)
class ShareSummary(ArmSummary):
    """One arm over its finished seeds; `levels` by difficulty."""

    runs: list[ShareMeasured]
    levels: dict[int | None, Level]

    def seeds_by_depth(self, difficulty: int | None = None) -> dict[int, list[float]]:
        return {depth: [run.reported(difficulty, depth).mean().item() for run in self.runs]
                for depth in self.levels[difficulty].shares}

    def rows(self) -> list[dict[str, Any]]:
        """Rows of kind `share` and `difference`, and with several trajectories `by_any`."""
        return [row for level in self.levels.values() for row in _rows(level)]


def _rows(level: Level) -> list[dict[str, Any]]:
    rows = [{"kind": "share", "difficulty": level.difficulty, "at": at, "depth": depth, **asdict(level.shares[depth])}
            for at, depth in level.at.items()]
    if level.difference is not None:
        rows.append({"kind": "difference", "difficulty": level.difficulty, **asdict(level.difference)})
    if (tried := level.tried) is not None:
        rows.append({"kind": "by_any", "difficulty": level.difficulty, "depth": tried.depth,
                     "trajectories": tried.trajectories, "layer_forwards": tried.layer_forwards,
                     **asdict(tried.share)})
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
    return Level(difficulty, at, shares, None if runs is first else _difference(difficulty, runs, first),
                 _tried(difficulty, runs, best) if runs[0].by_any else None)


def _tried(difficulty: int | None, runs: list[ShareMeasured], depth: int) -> Tried:
    """The share that the trajectories of an arm solve at a depth, on the reported half of the problems."""
    share = spread([run.by_any[difficulty][depth][REPORTED].mean().item() for run in runs])
    costs = [row["layer_forwards"] for run in runs for row in run.rows
             if row["metric"] == "solved" and (row["difficulty"], row["depth"]) == (difficulty, depth)]
    return Tried(depth, runs[0].place.config.evaluation.trajectories, share, fmean(costs))


def depths_of(runs: Sequence[ShareMeasured], difficulty: int | None) -> list[int]:
    """Depths at which every run was measured."""
    return sorted(set.intersection(*(set(run.right[difficulty]) for run in runs)))


def best_depth(runs: Sequence[ShareMeasured], difficulty: int | None) -> int:
    """The depth with most right answers on the choosing half, over all seeds; ties go to the shallowest."""
    def share(depth: int) -> float:
        return torch.stack([run.right[difficulty][depth][CHOOSING] for run in runs]).mean().item()

    return max(depths_of(runs, difficulty), key=share)


def _difference(difficulty: int | None, runs: list[ShareMeasured], first: list[ShareMeasured]) -> Difference | None:
    """Paired difference to the first arm, each at its own best depth."""
    mine, theirs = best_depth(runs, difficulty), best_depth(first, difficulty)
    return difference(runs, first, lambda run: run.reported(difficulty, mine),
                      lambda other: other.reported(difficulty, theirs))
