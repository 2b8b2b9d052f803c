"""Validation metrics and samples during training, with the current weights."""

from functools import partial
from typing import Any

import numpy as np

from looped.config import Config
from looped.data.eval_text import HeldoutText
from looped.data.from_config import Data
from looped.domains import domain_of
from looped.evaluation.workers import ALONE, Workers, placed
from looped.objectives import Objective
from looped.rng import StepRandom

HELDOUT_STEP = -1
"""The step that seeds the noise of the held-out loss; it is never trained."""


def heldout_figures(objective: Objective, data: Data | HeldoutText, config: Config,
                    workers: Workers = ALONE) -> dict[str, float]:
    """Validation metrics of the kind of data; for a block alone only its own loss, since a solver needs all blocks.
    workers: the processes that divide the batches, and all call it."""
    domain = domain_of(config)

    def figures(part: Data | HeldoutText, config: Config) -> dict[str, float]:
        own = partial(heldout_own, objective, part, config, workers)
        return own() if config.blocks.alone is not None else domain.validate(objective, part, config, own, workers)

    return domain.by_source(data, config, figures)


def heldout_samples(objective: Objective, data: Data, config: Config, workers: Workers = ALONE) -> str | np.ndarray:
    """A sample text or answer by the current weights, or a picture of the images they make."""
    return domain_of(config).preview(objective, data, config, workers)


def heldout_own(objective: Objective, data: Data | HeldoutText, config: Config,
                workers: Workers = ALONE) -> dict[str, float]:
    """The training loss on held-out data, with the same noise at every call; it needs no solver."""
    device = next(objective.parameters()).device
    batches = list(domain_of(config).batches(data, config))
    num = sum(map(len, batches))

    def total(each: tuple[int, Any]) -> float:
        first, batch = each
        random = StepRandom(config.seed, HELDOUT_STEP, start=first, count=len(batch), total=num, device=device)
        return objective(batch.to(device), random).value.item() * len(batch)

    return {"loss": sum(workers.over(placed(batches), total)) / num}
