"""Figures of an arm on text over its seeds: losses over depth, as a next-token predictor, of judged samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from looped.compare.summary import ArmSummary, Difference, Spread, by_arm, difference, spread
from looped.compare.text_measure import TextMeasured
from looped.evaluation.rows import confidence_interval


@dataclass(frozen=True)
class TextSummary(ArmSummary):
    """One arm over its finished seeds. `by_depth`: nats a token; `main`: as a next-token predictor."""

    runs: list[TextMeasured]
    main: Spread
    by_depth: dict[int, Spread]
    difference: Difference | None

    def over_seeds(self, figure: Callable[[TextMeasured], float | None]) -> Spread | None:
        """A figure of every run; None where a run has none."""
        values = [figure(run) for run in self.runs]
        return None if None in values else spread(values)

    @property
    def judged_depths(self) -> list[int]:
        """Depths at which a judge has read the samples of every run."""
        return sorted(set.intersection(*(set(run.losses.get("judged_behind_twin", ())) for run in self.runs)))

    def behind(self, metric: str, depth: int) -> tuple[float, float, float]:
        """Mean and 95 % interval over prompts of a paired difference, averaged over seeds."""
        each = torch.stack([run.losses[metric][depth] for run in self.runs]).mean(0)
        return each.mean().item(), *confidence_interval(each)


def summarise_texts(measured: Sequence[TextMeasured]) -> list[TextSummary]:
    """Arms in their order; differences are to the first."""
    groups = by_arm(measured)
    first = next(iter(groups.values()), [])
    return [_summarise(name, runs, first) for name, runs in groups.items()]


def _summarise(name: str, runs: list[TextMeasured], first: list[TextMeasured]) -> TextSummary:
    depths = sorted(set.intersection(*(set(run.losses["nats_per_token"]) for run in runs)))
    return TextSummary(
        name, runs, main=spread([run.main.mean().item() for run in runs]),
        by_depth={depth: spread([run.losses["nats_per_token"][depth].mean().item() for run in runs])
                  for depth in depths},
        difference=None if runs is first else loss_difference(runs, first))


def loss_difference(runs: Sequence[TextMeasured], others: Sequence[TextMeasured]) -> Difference | None:
    """Of the next-token losses."""
    return difference(runs, others, lambda run: run.main, lambda other: other.main)
