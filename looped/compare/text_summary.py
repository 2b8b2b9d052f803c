"""Summary of an arm on text over its seeds: losses by depth, the next-token loss, and judged samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from looped.compare.summary import MeanSummary, Spread, spread, summarise_means
from looped.compare.text_measure import TextMeasured
from looped.evaluation.intervals import confidence_interval


@dataclass(frozen=True)
class TextSummary(MeanSummary):
    """One arm over its finished seeds. `by_depth`: nats/token; `main`: nats/token as a next-token predictor."""

    runs: list[TextMeasured]

    def over_seeds(self, figure: Callable[[TextMeasured], float | None]) -> Spread | None:
        """Spread of a value over all runs; None if a run lacks it."""
        values = [figure(run) for run in self.runs]
        return None if None in values else spread(values)

    @property
    def judged_depths(self) -> list[int]:
        """Depths at which samples were judged in every seed's run of this arm."""
        return sorted(set.intersection(*(set(run.losses.get("judged_behind_twin", ())) for run in self.runs)))

    def behind(self, metric: str, depth: int) -> tuple[float, float, float]:
        """Mean and 95 % interval over prompts of a paired difference, averaged over seeds."""
        each = torch.stack([run.losses[metric][depth] for run in self.runs]).mean(0)
        return each.mean().item(), *confidence_interval(each)


def summarise_texts(measured: Sequence[TextMeasured]) -> list[TextSummary]:
    """Arms in their order; differences are to the first."""
    return summarise_means(measured, TextSummary)
