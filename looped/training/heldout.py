"""Validation metrics and samples during training, with the current weights."""

from functools import partial

import numpy as np

from looped.config import Config
from looped.data.eval_text import HeldoutText
from looped.data.from_config import Data
from looped.domains import domain_of
from looped.objectives import Objective
from looped.rng import StepRandom

HELDOUT_STEP = -1
"""The step that seeds the noise of the held-out loss; it is never trained."""


def heldout_figures(objective: Objective, data: Data | HeldoutText, config: Config) -> dict[str, float]:
    """Validation metrics of the kind of data; for a block alone only its own loss, since a solver needs all blocks."""
    domain = domain_of(config)

    def figures(part: Data | HeldoutText, config: Config) -> dict[str, float]:
        own = partial(heldout_own, objective, part, config)
        return own() if config.blocks.alone is not None else domain.validate(objective, part, config, own)

    return domain.by_source(data, config, figures)


def heldout_samples(objective: Objective, data: Data, config: Config) -> str | np.ndarray:
    """A sample text or answer by the current weights, or a picture of the images they make."""
    return domain_of(config).preview(objective, data, config)


def heldout_own(objective: Objective, data: Data | HeldoutText, config: Config) -> dict[str, float]:
    """The training loss on held-out data, with the same noise at every call; it needs no solver."""
    device, total, done = next(objective.parameters()).device, 0.0, 0
    batches = list(domain_of(config).batches(data, config))
    num = sum(map(len, batches))
    for batch in batches:
        random = StepRandom(config.seed, HELDOUT_STEP, start=done, count=len(batch), total=num, device=device)
        total += objective(batch.to(device), random).value.item() * len(batch)
        done += len(batch)
    return {"loss": total / num}
