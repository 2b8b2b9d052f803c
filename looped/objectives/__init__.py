"""Training rules: how `step` is unrolled, and where gradients flow. Built by name with `build_objective`."""

from torch import nn

from looped.config import Config
from looped.config.rules import RULES
from looped.errors import UserError
from looped.import_path import class_at
from looped.models.image_denoiser import ImageDenoiser
from looped.models.language import LanguageModel
from looped.nn.checks import require
from looped.objectives.base import Loss, Objective
from looped.objectives.blockwise import Blockwise
from looped.objectives.bptt import Autoregressive, Full, Progressive, Truncated
from looped.objectives.denoise import Denoise
from looped.objectives.fixed_point import FixedPoint
from looped.objectives.local_rules.forward_forward import ForwardForward
from looped.objectives.local_rules.noprop import NoPropCT, NoPropDT, NoPropFM
from looped.objectives.masked import Masked, MaskedBlocks
from looped.objectives.one_step import OneStep
from looped.objectives.pixel_denoising import BlockwisePixels, DenoisePixels
from looped.rng import seeded_init

__all__ = ["Autoregressive", "Blockwise", "BlockwisePixels", "Denoise", "DenoisePixels", "FixedPoint", "ForwardForward",
           "Full", "Loss", "Masked", "MaskedBlocks", "NoPropCT", "NoPropDT", "NoPropFM", "Objective", "OneStep",
           "Progressive", "Truncated", "build_objective", "objective_class", "trained_depths"]

def objective_class(config: Config) -> type[Objective]:
    """The class of a config's rule, for its kind of data."""
    if config.objective not in RULES:
        return class_at(config.objective, "objective")
    return class_at(config.rule.paths.get(config.kind.like, config.rule.path), "objective")


def trained_depths(config: Config) -> tuple[int, int]:
    """(smallest, largest) depth that training runs."""
    return objective_class(config).trained_depths(config)


def build_objective(config: Config, model: LanguageModel | ImageDenoiser,
                    end_of_text: int | None = None) -> Objective:
    """The training rule `config.objective` around `model`; parameters that it adds are initialised from the seed.

    end_of_text: the token that ends a document, required by `data.documents separate`. Raises UserError if it is
    required but missing, and for arguments of the wrong type.
    """
    require(config, Config, "config", "call build_objective(config, model)")
    require(model, nn.Module, "model", "call build_objective(config, build(config, vocab_size))")
    with seeded_init(config.seed, "objective"):
        objective = objective_class(config).from_config(config, model)
    if type(objective).layer_forwards is Objective.layer_forwards:  # before the first step, which counts them
        objective.layer_forwards()
    objective.end_of_text = end_of_text
    objective.setting = config.objective
    objective.learned = "" if config.kind.writes else config.kind.noun
    objective.separate = "data.documents" in config.kind.reads and config.data.documents == "separate"
    if objective.separate and end_of_text is None:
        raise UserError("data.documents separate splits documents at their end-of-text token; pass end_of_text=, "
                        "or set data.documents to packed")
    return objective
