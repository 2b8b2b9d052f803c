"""Training rules: how `step` is unrolled, and where gradients flow. Found by name through `build_objective`."""

from torch import nn

from looped.config import Config
from looped.errors import UserError
from looped.models.image_denoiser import ImageDenoiser
from looped.models.language import LanguageModel
from looped.models.per_block import PerBlockModel
from looped.nn.checks import require
from looped.objectives.base import Loss, Objective
from looped.objectives.blockwise import Blockwise
from looped.objectives.bptt import Autoregressive, Full, Progressive, Truncated
from looped.objectives.denoise import Denoise
from looped.objectives.fixed_point import FixedPoint
from looped.objectives.forward_forward import ForwardForward
from looped.objectives.masked import Masked, MaskedBlocks
from looped.objectives.noprop import NoPropCT, NoPropDT, NoPropFM
from looped.objectives.one_step import OneStep
from looped.objectives.per_block import PerBlock
from looped.objectives.pixels import BlockwisePixels, DenoisePixels
from looped.rng import seeded_init

__all__ = ["Autoregressive", "Blockwise", "BlockwisePixels", "Denoise", "DenoisePixels", "FixedPoint", "ForwardForward",
           "Full", "Loss", "Masked", "MaskedBlocks", "NoPropCT", "NoPropDT", "NoPropFM", "Objective", "OneStep",
           "PerBlock", "Progressive", "Truncated", "build_objective"]

UNROLLED = {"full": Full, "truncated": Truncated, "progressive": Progressive, "ar": Autoregressive}
NOPROP = {"noprop-dt": NoPropDT, "noprop-ct": NoPropCT, "noprop-fm": NoPropFM}


def build_objective(config: Config, model: LanguageModel | ImageDenoiser | PerBlockModel,
                    end_of_text: int | None = None) -> Objective:
    """The training rule `config.objective` around `model`; what it adds to the model is initialised from the seed.
    end_of_text: the token that ends a document, which `data.documents separate` cannot do without. Raises UserError
    where it is missing, and for arguments of another kind."""
    require(config, Config, "config", "call build_objective(config, model)")
    require(model, nn.Module, "model", "call build_objective(config, build(config, vocab_size))")
    objective = _rule(config, model)
    of_text = not (config.is_task or config.is_images)
    objective.end_of_text, objective.separate = end_of_text, of_text and config.data.documents == "separate"
    if objective.separate and end_of_text is None:
        raise UserError("data.documents separate tells documents apart by their end-of-text token; pass end_of_text=, "
                        "or set data.documents to packed")
    return objective


def _rule(config: Config, model: LanguageModel | ImageDenoiser | PerBlockModel) -> Objective:
    with seeded_init(config.seed, "objective"):
        if config.generates:
            settings = model, config.denoise, config.images.label_dropout
            return DenoisePixels(*settings) if config.blocks.num == 1 else BlockwisePixels(*settings, config.blocks)
        if config.objective == "denoise":
            return Denoise(model, config.denoise)
        if config.objective == "blockwise":
            rule = PerBlock if config.blocks.shared == "per-block" else Blockwise
            return rule(model, config.denoise, config.blocks)
        if config.objective == "masked":
            several = config.blocks.num > 1
            return MaskedBlocks(model, config.masked, config.blocks) if several else Masked(model, config.masked)
        if config.objective == "one-step":
            return OneStep(model, config.recurrence, config.supervision)
        if config.objective == "fixed-point":
            return FixedPoint(model, config.recurrence, config.fixed_point)
        if config.is_noprop:
            return NOPROP[config.objective](model, config.noprop)
        if config.objective == "forward-forward":
            return ForwardForward(model, config.forward_forward)
        return UNROLLED[config.objective](model, config.recurrence)
