"""Warm start from another run's weights: an autoregressive baseline, or a denoiser with block size 1 for larger blocks.
"""

from pathlib import Path

import torch
from torch import Tensor

from looped.config import Config
from looped.data.from_config import Data
from looped.errors import UserError
from looped.objectives import Objective
from looped.training.resume_rules import differences
from looped.training.runs import Run, identity_of

CONDITIONING = ("level_embedding.", ".modulation.", ".boundary.")
"""Parts of the names of weights that condition a model on the noise level or the loop step, or that lie between two
loop steps. A run may have none, and with their initial values the model computes the same as without them."""

MEANING = {"num_heads": "num_heads", "num_kv_heads": "kv_heads", "head_dim": "head_width", "block": "block"}
"""Settings that decide the meaning of weights, whose shapes they may leave as they are -> the attributes of
`ModelConfig` with their values."""
FREE = ("preset", "attention", *MEANING)
"""Settings of the model that are no difference, or are compared by `MEANING`."""


@torch.no_grad()
def take_over(objective: Objective, config: Config, run: Run, data: Data) -> str:
    """Copy every weight of `run` that `objective` also has; return a line that names those that keep their initial
    values, those of `run` that are not used, and other model settings.

    All weights of the model must be found, and all of the run's model used, except those that condition it on a noise
    level and blocks that `objective` does not hold, and all shapes must match. Raises UserError otherwise, for a run
    with another tokenizer, or whose model reads its weights otherwise, and for a run on other data unless
    `training.other_data`.
    """
    _check_meaning(config, run)
    if data.tokenizer is not None and run.tokenizer.json() != data.tokenizer.json():
        raise UserError(f"training.warm_start {run.path} has another tokenizer; choose a run on the same text with the "
                        f"same data settings")
    if not config.training.other_data:
        check_source("training.warm_start", run.path, data)
    theirs, ours, kept = _weights(run.objective), _weights(objective), []
    for name, weight in ours.items():
        if name in theirs:
            if theirs[name].shape != weight.shape:
                raise UserError(f"training.warm_start {run.path}: '{name}' has shape {tuple(theirs[name].shape)} there "
                                f"and {tuple(weight.shape)} here; give both runs the same model settings")
            weight.copy_(theirs[name])
        elif _is_needed(name):
            raise UserError(f"training.warm_start {run.path} has no '{name}'; give both runs the same model settings")
        else:
            kept.append(name)
    unused = [name for name in theirs if name not in ours]
    if (lost := next(filter(_is_needed, unused), None)) and config.blocks.alone is None:
        raise UserError(f"training.warm_start {run.path} has '{lost}', which this model lacks; give both runs the same "
                        f"model settings")
    return f"weights of {run.path}; " + "; ".join(
        [f"new: {', '.join(kept) or 'none'}", *([f"not used: {', '.join(unused)}"] if unused else []),
         *_other_settings(config, run)])


def _check_meaning(config: Config, run: Run) -> None:
    """Raises UserError for a model in which the same weights mean something else."""
    for name, attribute in MEANING.items():
        there, here = getattr(run.config.model, attribute), getattr(config.model, attribute)
        if there != here:
            raise UserError(f"training.warm_start {run.path} was trained with model.{name} {there}, now it is {here}, "
                            f"by which its weights would mean something else; give both runs the same model settings")


def _other_settings(config: Config, run: Run) -> list[str]:
    """The settings of the model in which the run differs, each with both values."""
    there, here = run.config.model.model_dump(mode="json"), config.model.model_dump(mode="json")
    return [f"{change.setting} {change.old} there, {change.new} here"
            for change in differences(there, here, "model.") if change.setting.split(".")[1] not in FREE]


def _is_needed(name: str) -> bool:
    """True for a weight of the model, unless it conditions the model."""
    return name.startswith("model.") and not any(part in name for part in CONDITIONING)


def check_source(setting: str, run: str | Path, data: Data) -> None:
    """Raises UserError if the run named by a setting was trained on other data than these."""
    change = identity_of(run).change(data, "there", "here")
    if change is not None:
        raise UserError(f"{setting} {run} was trained on other data ({change}); choose a run on the same data, or set "
                        f"training.other_data to true to allow it")


def _weights(objective: Objective) -> dict[str, Tensor]:
    """Weights by the names that all objectives have in common; a denoiser holds the model one level deeper."""
    return {name.removeprefix("denoiser."): weight for name, weight in objective.named_parameters()}
