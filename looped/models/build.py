"""From a config to a language model."""

from looped.config import Config
from looped.models.language import LanguageModel
from looped.rng import seeded_init


def effective_depth(config: Config) -> int:
    """Layers on the longest residual path: the core counts once a loop step (Huginn, `mean` of them)."""
    model = config.model
    return model.num_prelude_layers + model.num_core_layers * config.main_depth + model.num_coda_layers


def build(config: Config, vocab_size: int) -> LanguageModel:
    """The model of a config, its weights a function of `config.seed`."""
    cond_width = config.denoise.cond_width if config.objective == "denoise" else None
    with seeded_init(config.seed, "init"):
        return LanguageModel(config.model, vocab_size, cond_width=cond_width, effective_depth=effective_depth(config))
