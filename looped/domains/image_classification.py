"""The domain of image classification: batches of labelled images, and validation accuracy by depth."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from looped.config import Config
from looped.data.batch import Batch
from looped.data.image_batches import LabelledData
from looped.domains.base import About, Domain, Evaluated, Options, Own
from looped.evaluation.accuracy import classify
from looped.evaluation.metric_rows import Keep
from looped.evaluation.result_files import EvaluationFiles
from looped.evaluation.workers import Workers
from looped.inference.rollout import answer
from looped.objectives.base import Objective
from looped.tensor_types import Bool


@dataclass(frozen=True)
class ClassifyEvaluated(Evaluated):
    """The accuracy of a classifier by depth, drawn in one picture; `right[depth]`: mask of the held-out images that are
    classified correctly."""

    right: dict[int, Bool[Tensor, "num"]]

    def leave(self, files: EvaluationFiles, config: Config, about: About) -> str:
        super().leave(files, config, about)
        return f"picture in {files.folder / 'plots'}, rows in {files.folder / 'eval'}"


class Classify(Domain):
    """Images to classify."""

    name = "classify"

    def does(self, config: Config) -> str:
        return "classifies images"

    def batches(self, data: LabelledData, config: Config) -> Iterable[Batch]:
        return data.heldout(config.evaluation.batch_size)

    def validate(self, objective: Objective, data: LabelledData, config: Config, own: Own,
                 workers: Workers) -> dict[str, float]:
        """Validation accuracy at the best of `evaluation.depths`."""
        found = classify(objective, data, config, config.evaluation.depths, workers=workers)
        depth, share = found.best()
        first = min(found.right)
        return {"accuracy": share, "best_depth": depth,
                f"accuracy_at_{first}": found.right[first].double().mean().item()}

    def preview(self, objective: Objective, data: LabelledData, config: Config, workers: Workers) -> str:
        """Labels and predicted classes of the first `evaluation.num_samples` held-out images, at the deepest of
        `evaluation.sample_depths`."""
        c, names, depth = config.evaluation, data.images.class_names, max(config.evaluation.sample_depths)
        batch = next(iter(data.heldout(c.num_samples))).to(next(objective.parameters()).device)
        answers = workers.over([batch], lambda images: answer(objective, images, [depth], config)[
            depth].answers[:, 0].tolist())[0]
        return "\n".join([f"depth {depth}", *(f"{names[label]} taken for {names[named]}" for label, named in
                                              zip(batch.targets[:, 0].tolist(), answers, strict=True))])

    def sequences(self, data: LabelledData, config: Config, options: Options) -> list[dict[str, Any]]:
        labels = torch.cat([batch.targets[:, 0] for batch in self.batches(data, config)]).tolist()
        return [{"index": list(range(len(labels))), "label": labels}]

    def evaluate(self, objective: Objective, data: LabelledData, config: Config, depths: Sequence[int],
                 options: Options, *, keep: Keep) -> ClassifyEvaluated:
        found = classify(objective, data, config, depths, keep=keep)
        return ClassifyEvaluated(found.rows, found.right)
