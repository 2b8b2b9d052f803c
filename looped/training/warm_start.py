"""Warm start from another run's weights: an autoregressive baseline, or a denoiser with block size 1 for larger blocks.
"""

from pathlib import Path

import torch
from torch import Tensor

from looped.data.from_config import Data
from looped.errors import UserError
from looped.objectives import Objective
from looped.training.runs import Run, identity_of

CONDITIONING = ("level_embedding.", ".modulation.", ".boundary.")
"""Parts of the names of weights that condition a model on the noise level or the loop step, or that lie between two
loop steps. A run may have none, and with their initial values the model computes the same as without them."""


@torch.no_grad()
def take_over(objective: Objective, run: Run, data: Data, other_data: bool) -> list[str]:
    """Copy every weight of `run` that `objective` also has; return the names of those that keep their initial values.

    All weights of the model must be found, except those that condition it on a noise level, and all shapes must match.
    Raises UserError otherwise, for a run with another tokenizer, and for a run on other data unless `other_data`.
    """
    if data.tokenizer is not None and run.tokenizer.json() != data.tokenizer.json():
        raise UserError(f"training.warm_start {run.path} has another tokenizer; choose a run on the same text with the "
                        f"same data settings")
    if not other_data:
        check_source("training.warm_start", run.path, data)
    theirs, kept = _weights(run.objective), []
    for name, weight in _weights(objective).items():
        if name in theirs:
            if theirs[name].shape != weight.shape:
                raise UserError(f"training.warm_start {run.path}: '{name}' has shape {tuple(theirs[name].shape)} there "
                                f"and {tuple(weight.shape)} here; give both runs the same model settings")
            weight.copy_(theirs[name])
        elif name.startswith("model.") and not any(part in name for part in CONDITIONING):
            raise UserError(f"training.warm_start {run.path} has no '{name}'; give both runs the same model settings")
        else:
            kept.append(name)
    return kept


def check_source(setting: str, run: str | Path, data: Data) -> None:
    """Raises UserError if the run named by a setting was trained on other data than these."""
    change = identity_of(run).change(data, "there", "here")
    if change is not None:
        raise UserError(f"{setting} {run} was trained on other data ({change}); choose a run on the same data, or set "
                        f"training.other_data to true to allow it")


def _weights(objective: Objective) -> dict[str, Tensor]:
    """Weights by the names that all objectives have in common; a denoiser holds the model one level deeper."""
    return {name.removeprefix("denoiser."): weight for name, weight in objective.named_parameters()}
