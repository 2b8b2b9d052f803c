"""From a config to a language model."""

from looped.config import Config
from looped.models.language import LanguageModel, start_weights
from looped.rng import seeded_init


def effective_depth(config: Config, block: int | None = None) -> int:
    """Layers on the longest residual path: the core counts once a loop step (Huginn, `mean` of them). Under `blockwise`
    a path goes through one block: through `block`, or one of mean size."""
    model, core = config.model, config.step_layers * config.main_depth
    if config.objective == "blockwise":
        core = config.step_layers if block is None else config.block_layers[block]
    return model.num_prelude_layers + round(core) + model.num_coda_layers


def build(config: Config, vocab_size: int) -> LanguageModel:
    """The model of a config, its weights a function of `config.seed`; those of one of several blocks are a function of
    the seed and its number, whatever the other blocks are."""
    cond_width = config.denoise.cond_width if config.denoises else None
    with seeded_init(config.seed, "init"):
        model = LanguageModel(config.model, vocab_size, cond_width=cond_width, core_layers=config.block_layers,
                              effective_depth=effective_depth(config))
    if config.blocks.num > 1:
        for number, block in enumerate(model.recurrence.core.blocks):
            with seeded_init(config.seed, f"block{number}"):
                start_weights(block, model.width, effective_depth(config, number))
    return model
