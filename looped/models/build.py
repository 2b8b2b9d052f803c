"""Build the model of a config: a language model, an image classifier or an image denoiser."""

from looped.config import Config
from looped.data.image_batches import ImageSpec
from looped.import_path import class_at
from looped.models.image_denoiser import ImageDenoiser
from looped.models.language import LanguageModel, Structure, start_weights
from looped.nn.checks import require, whole_number
from looped.rng import seeded_init


def effective_depth(config: Config, block: int | None = None) -> int:
    """Layers on the longest residual path; the core counts once per loop step (Huginn: `mean` steps). If a step trains
    one block of several, the path goes through one block: `block`, or one of mean size. Under `forward-forward` it
    goes through one layer."""
    model, core = config.model, config.step_layers * _counted_steps(config)
    if config.rule.residual_layers is not None:
        return config.rule.residual_layers(config)
    if config.rule.trains_one_block(config):
        core = config.step_layers if block is None else config.model.layer_runs * config.block_layers[block]
    return model.num_prelude_layers + round(core) + model.num_coda_layers


def _counted_steps(config: Config) -> int:
    """The loop steps that count in the initialisation: one if `model.loop_scale` divides the branches by all."""
    return 1 if config.rule.bounds_steps and config.model.loop_scale == "branches" else config.main_depth


Model = LanguageModel | ImageDenoiser


def build(config: Config, vocab_size: int, picture: ImageSpec | None = None) -> Model:
    """The model of a config, with weights that depend on `config.seed` alone.

    With several blocks, the weights of a block depend on the seed and its number, and the weights around the core on
    the seed, whichever blocks are held (`blocks.alone`). With a `picture`, the model is a classifier or (`images.goal`)
    a denoiser of such images, and the vocabulary is the classes. Raises UserError if `config` is not a Config, or for a
    vocabulary below 1."""
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


def unseeded(config: Config, vocab_size: int, picture: ImageSpec | None = None) -> Model:
    """`build` with weights from torch's global random state; a meta device needs no seed."""
    structure = Structure(cond_width=config.cond_width, core_layers=config.block_layers,
                          effective_depth=effective_depth(config), held=config.blocks.held,
                          checkpointed=config.training.checkpoint_activations, mask_token=config.rule.hides,
                          loop_steps=config.main_depth if config.rule.bounds_steps else None)
    return class_at(config.kind.model, "model").of_data(config, vocab_size, picture, structure)
