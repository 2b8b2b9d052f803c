"""Accuracy of a classifier on held-out images, one row per depth."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from looped.config import Config
from looped.data.batch import Batch
from looped.data.image_batches import LabelledData
from looped.evaluation.depth_sweep import peak_bytes
from looped.evaluation.metric_rows import Keep, Row, example_lines, keep_nothing, summarise
from looped.evaluation.solving import best_depth
from looped.evaluation.workers import ALONE, Workers, placed
from looped.inference.rollout import answer, at_once, rollout_of
from looped.objectives.base import Objective, evaluating
from looped.tensor_types import Bool


@dataclass(frozen=True)
class Classified:
    """`rows`: `accuracy` by depth; `right[depth]`: mask of the held-out images classified correctly."""

    rows: list[Row]
    right: dict[int, Bool[Tensor, "num"]]

    def best(self) -> tuple[int, float]:
        """(depth, accuracy) of the most accurate depth; ties go to the shallowest."""
        return best_depth(self.right)


def classify(objective: Objective, data: LabelledData, config: Config, depths: Sequence[int], *,
             keep: Keep = keep_nothing, workers: Workers = ALONE) -> Classified:
    """Classify every held-out image at each depth (loop steps, or solver steps of a denoiser). `keep` receives each
    finished part. workers: the processes that divide the batches."""
    rows, right = [], {}
    for group in at_once(objective, depths):
        start = time.perf_counter()
        found = _right(objective, data, config, group, workers)
        seconds = time.perf_counter() - start
        part = [summarise("accuracy", found[depth].double(), depth=depth, seconds=seconds, peak_bytes=peak_bytes(),
                           **rollout_of(objective).answer_cost(depth, config.evaluation).fields()) for depth in group]
        keep(part, example_lines("accuracy", found))
        rows, right = rows + part, right | found
    return Classified(rows, right)


def _right(objective: Objective, data: LabelledData, config: Config,
           depths: Sequence[int], workers: Workers) -> dict[int, Bool[Tensor, "num"]]:
    device = next(objective.parameters()).device

    def of_batch(each: tuple[int, Batch]) -> dict[int, Bool[Tensor, "num"]]:
        first, batch = each
        answers = answer(objective, batch.to(device), depths, config, first=first)
        return {depth: answered.answers[:, 0].cpu() == batch.targets[:, 0] for depth, answered in answers.items()}

    with evaluating(objective):
        parts = workers.over(placed(data.heldout(config.evaluation.batch_size)), of_batch)
    return {depth: torch.cat([part[depth] for part in parts]) for depth in depths}
