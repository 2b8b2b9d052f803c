"""From a config to a language model, to a classifier of images, or to a denoiser of them."""

from looped.config import Config
from looped.data.labelled import Picture
from looped.dotted import class_at
from looped.models.image_denoiser import ImageDenoiser
from looped.models.language import LanguageModel, Structure, start_weights
from looped.nn.checks import require, whole_number
from looped.rng import seeded_init


def effective_depth(config: Config, block: int | None = None) -> int:
    """Layers on the longest residual path: the core counts once a loop step (Huginn, `mean` of them). Where a step
    trains one block of several, a path goes through one: through `block`, or one of mean size; under `forward-forward`
    through one layer."""
    model, core = config.model, config.step_layers * config.main_depth
    if config.rule.residual_layers is not None:
        return config.rule.residual_layers(config)
    if config.rule.trains_one_block(config):
        core = config.step_layers if block is None else config.block_layers[block]
    return model.num_prelude_layers + round(core) + model.num_coda_layers


Model = LanguageModel | ImageDenoiser


def build(config: Config, vocab_size: int, picture: Picture | None = None) -> Model:
    """The model of a config, its weights a function of `config.seed`; those of one of several blocks are a function of
    the seed and its number, and what the blocks share one of the seed, whatever other blocks there are and whichever of
    them are held (`blocks.alone`). With a `picture` a classifier, or by `images.goal` a denoiser, of such images, whose
    vocabulary are the classes. Raises UserError for a config of another kind or a vocabulary below 1."""
    require(config, Config, "config", "load one with looped.load_config(path), or make one with looped.Config()")
    whole_number("vocab_size", vocab_size, 1)
    with seeded_init(config.seed, "init"):
        model = unseeded(config, vocab_size, picture)
    if config.blocks.num > 1:
        with seeded_init(config.seed, "init"):
            model.start_shared(effective_depth(config))
        for number in config.blocks.held:
            with seeded_init(config.seed, f"block{number}"):
                start_weights(model.recurrence.core.blocks[number], model.width, effective_depth(config, number))
    return model


def unseeded(config: Config, vocab_size: int, picture: Picture | None = None) -> Model:
    """The same with weights from torch's global state, which a meta device does not need."""
    structure = Structure(cond_width=config.cond_width, core_layers=config.block_layers,
                          effective_depth=effective_depth(config), held=config.blocks.held,
                          checkpointed=config.training.checkpoint_activations, mask_token=config.rule.hides)
    return class_at(config.kind.model, "model").of_data(config, vocab_size, picture, structure)
