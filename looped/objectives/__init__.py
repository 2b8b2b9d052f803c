"""Training rules: how `step` is unrolled, and where gradients flow. Found by name through `build_objective`."""

from looped.config import Config
from looped.models.language import LanguageModel
from looped.objectives.base import Loss, Objective
from looped.objectives.bptt import Autoregressive, Full, Truncated
from looped.objectives.denoise import Denoise
from looped.rng import seeded_init

__all__ = ["Autoregressive", "Denoise", "Full", "Loss", "Objective", "Truncated", "build_objective"]


def build_objective(config: Config, model: LanguageModel) -> Objective:
    """The training rule `config.objective` around `model`; what it adds to the model is initialised from the seed."""
    with seeded_init(config.seed, "objective"):
        if config.objective == "denoise":
            return Denoise(model, config.denoise)
        return {"full": Full, "truncated": Truncated, "ar": Autoregressive}[config.objective](model, config.recurrence)
