"""FLOPs of a training step, in closed form over the parts that run; and the sizes that the closed forms share.

A multiplication with its addition is two FLOPs; only matrix products of the model count, none of a fixed-point solver;
attention is counted as the pairs that its mask allows, L^2 a head where all rows see each other (also under
`task.window`: SDPA works all of them out), L (L + 1) / 2 where causal, also of blocks, for which SDPA's kernel works
out all L x 2L. A backward pass is twice its forward, so products that backward makes a second time (attention scores,
logits, what a gate of short rows multiplies) are not counted: they buy memory, not training.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from looped.config import Config
from looped.config.data import TaskConfig
from looped.config.images import ImageConfig
from looped.config.model import ModelConfig
from looped.data.labelled import Picture, prepare_labelled
from looped.data.problems import cells_of
from looped.diffusion import masking
from looped.diffusion.noise import block_shares, noise_from_config
from looped.diffusion.targets import target_dim
from looped.objectives.denoise import carried_readings, settling_readings
from looped.objectives.depth import (
    expected_depths,
    expected_progressive_depths,
    fixed_point_steps,
    progressive_shares,
)

Number = int | float
NUM_LEVEL_FEATURES = 64
"""Sines and cosines that `LevelEmbedding` reads a level by."""


@dataclass(frozen=True)
class Part:
    """Something that runs for every token: FLOPs of one forward, how often it runs without and with gradient (half of
    each where the weight needs a gradient and the input none), and how many forwards backward adds to the usual two.
    """

    name: str
    flops: Number
    no_grad: Number
    grad: Number
    backward: Number = 0


def parts_of(config: Config, vocab_size: int) -> list[Part]:
    """Everything with a matrix product in one training step; FLOPs are those of a token."""
    frozen = frozen_share(config)
    if config.generates:
        return [_frozen(part, frozen) for part in _pixel_parts(config)] if frozen else _pixel_parts(config)
    model, length = config.model, rows_of(config)
    layer, head = layer_flops(model, length, full=config.sees_all), 2 * model.width * vocab_size
    before = [*_patch_parts(config), Part("prelude", layer * model.num_prelude_layers, 0, 1)]
    if config.is_noprop:
        return [*before, *_noprop_parts(config, vocab_size)]
    if config.objective == "forward-forward":
        tried = vocab_size if config.forward_forward.negatives == "hard" else 0
        return [*before, Part("core", layer * model.num_core_layers, tried, mean_steps(config)[1])]
    if config.denoises or config.objective == "masked":
        own = _denoiser_parts(config, vocab_size) if config.denoises else _masked_parts(config, layer, head)
        return [_frozen(part, frozen) for part in [*before, *own]] if frozen else [*before, *own]
    (no_grad, grad), read, once = mean_steps(config), num_readings(config), config.objective == "one-step"
    return [*before, Part("injection", injection_flops(model), no_grad, grad),
            Part("core", layer * config.step_layers, no_grad, grad), *_implicit_parts(config),
            Part("coda", layer * model.num_coda_layers, 0, read), Part("head", head, 0, read),
            Part("halting head", 2 * model.width / length, 0, read * once), Part("answers", head, read * once, 0)]


def _patch_parts(config: Config) -> list[Part]:
    """Of images, the map that embeds patches; nobody needs a gradient of pixels."""
    picture = picture_of(config)
    if picture is None:
        return []
    share = 1 - 1 / picture.num_rows  # of the rows, all but that of the class
    return [Part("patches", 2 * picture.patch_numbers * config.model.width * share, 0.5, 0.5)]


def _pixel_parts(config: Config) -> list[Part]:
    """Of a denoiser of pixels; nobody needs a gradient of noisy images or of noise levels."""
    d, cond, length, size = config.model.width, config.denoise.cond_width, rows_of(config), patch_numbers(config)
    return [Part("patches", 2 * size * d, 0.5, 0.5), Part("level", 2 * cond * NUM_LEVEL_FEATURES / length, 0.5, 0.5),
            Part("conditioning", (_conditioning_flops(config) + 2 * cond * 2 * d) / length, 0, 1),
            Part("core", layer_flops(config.model, length, full=True) * core_layers(config), 0, 1),
            Part("pixels", 2 * d * size, 0, 1)]


def _implicit_parts(config: Config) -> list[Part]:
    """What the solve in backward adds: the core once more, and products with its transposed Jacobian. Such a product
    goes through every map to its input alone, but for the feed-forward net's second, whose gradient comes with its
    input's, and through both sides of attention's products."""
    model, solver = config.model, config.fixed_point
    if config.objective != "fixed-point" or solver.gradient != "implicit":
        return []
    mixing, second = _attention_flops(model, rows_of(config), full=config.sees_all), 2 * model.width * model.hidden
    layer, state = layer_flops(model, rows_of(config), full=config.sees_all), 1 - (model.injection == "diagonal")
    return [Part("core again", layer * model.num_core_layers + injection_flops(model), 0, 0, backward=1),
            Part("solve in backward", (layer + mixing + second) * model.num_core_layers
                 + injection_flops(model) * state, 0, 0, backward=solver.max_steps)]


def _denoiser_parts(config: Config, vocab_size: int) -> list[Part]:
    """Readings of the noisy rows, what lies between two of them, and what is read beside them."""
    model, denoise, length, full = config.model, config.denoise, rows_of(config), config.sees_all
    first, steps = mean_steps(config)
    clean, noisy = (layer_flops(model, length, full=full, block=block) for block in (1, denoise.block_size))
    table, head = 2 * noisy_dim(config) * vocab_size, 2 * model.width * vocab_size
    levels, posterior = num_levels(config) / length, denoise.posterior
    own, carried = denoise.carry == "estimate", carried_readings(denoise)
    level = level_flops(config)
    return [
        Part("clean rows", _clean_flops(config, clean), 0, 1),
        Part("level", level * levels, carried + steps / 2, steps / 2),
        Part("conditioning", _conditioning_flops(config) * levels, carried, steps),
        Part("level of all cells", (level + _conditioning_flops(config)) / length, settling_readings(denoise), 0),
        Part("noisy input", 2 * noisy_dim(config) * model.width, first, steps),
        Part("expected embedding", (table + head) * denoise.evidence_in, first, steps),
        Part("handed on", 2 * carry_size(config) * model.width, first + 0.5, steps - 0.5),  # at first, zeros
        Part("injection", injection_flops(model), first, steps),
        Part("core", noisy * core_layers(config), first, steps),
        Part("coda", noisy * model.num_coda_layers, first, steps),
        Part("head", head, 0, steps), Part("posterior", table * posterior, 0, steps),
        Part("logits", head + table * posterior, first, steps - 1),
        Part("estimate", table, first * own, steps - 1)]


def _noprop_parts(config: Config, vocab_size: int) -> list[Part]:
    """One reading of a noisy class, which stands in one of the rows."""
    model, noprop, length = config.model, config.noprop, rows_of(config)
    dim, flow = embedded_dim(config, vocab_size), config.objective == "noprop-fm"
    layer, learned = layer_flops(model, length, full=True), noprop.embedding == "learned"
    moves = learned or (not flow and noprop.schedule_of(config.objective) == "learned")  # z has a gradient
    share, levels = (0.5 * (not moves), 0.5 + 0.5 * moves), config.has_levels / length
    named, read = 2 * dim * vocab_size / length, 2 * model.width * vocab_size / length
    parts = [Part("level", level_flops(config) * levels, 0.5, 0.5),
             Part("conditioning", _conditioning_flops(config) * levels, 0, 1),
             Part("noisy input", 2 * dim * model.width / length, *share),
             Part("injection", injection_flops(model), 0, 1), Part("core", layer * config.step_layers, 0, 1),
             Part("coda", layer * model.num_coda_layers, 0, 1)]
    if flow:
        return [*parts, Part("velocity", 2 * model.width * dim / length, 0, 1), Part("classifier", named, 0, 1)]
    return [*parts, Part("class", read, 0, 1), Part("estimate", named, 0.5 * (not learned), 0.5 + 0.5 * learned),
            Part("classifier", named, *share)]


def _masked_parts(config: Config, layer: Number, head: Number) -> list[Part]:
    """One reading of a text of which some is hidden, whose every row goes through the head."""
    told = 1 / rows_of(config) if config.cond_width else 0
    return [Part("level", level_flops(config) * told, 0.5, 0.5),
            Part("conditioning", _conditioning_flops(config) * told, 0, 1),
            Part("injection", injection_flops(config.model), 0, 1), Part("core", layer * core_layers(config), 0, 1),
            Part("coda", layer * config.model.num_coda_layers, 0, 1), Part("head", head, 0, 1)]


FROZEN = {"patches": 0.0, "prelude": 0.0, "level": 0.0, "noisy input": 0.0, "expected embedding": 0.0, "handed on": 0.0,
          "posterior": 0.0, "conditioning": 0.5, "injection": 0.5, "coda": 0.5, "head": 0.5, "pixels": 0.5}
"""Part -> the share of its backward pass that is left where no weight outside the blocks is trained: none before the
block, the gradient of the weights alone at its entry, that of the input alone after it. Attention inside a frozen coda
counts as half, though it has two inputs."""


def frozen_share(config: Config) -> float:
    """The share of the steps in which no weight outside the blocks is trained."""
    if not config.one_block_a_step or config.is_noprop:
        return 0.0
    return sum(share for block, share in enumerate(shares_of(config)) if not config.blocks.trains_shared(block))


def _frozen(part: Part, share: float) -> Part:
    left = part.grad * (1 - share * (1 - FROZEN.get(part.name, 1.0)))
    return replace(part, no_grad=part.no_grad + part.grad - left, grad=left)


def layer_flops(model: ModelConfig, length: int, *, full: bool = False, block: int = 1) -> float:
    """One forward of one layer, a token, over `length` rows."""
    attention = _attention_flops(model, length, full=full, block=block)
    feed_forward = 2 * model.width * (model.ffn_inputs + model.hidden)
    return 4 * model.width**2 + _key_value_flops(model) + attention + feed_forward


def _attention_flops(model: ModelConfig, length: int, *, full: bool, block: int = 1) -> float:
    """Scores and mixing of rows that see what they may: all of them, those up to themselves, or each its block and the
    clean rows up to the first of it. A row's own key beside a context is no matrix product."""
    seen = length if full else (length - block) / 2 + 1 + (block if block > 1 else 0)
    return 2 * 2 * model.width * seen


def _key_value_flops(model: ModelConfig) -> int:
    return 2 * 2 * model.width * kv_width(model)


def injection_flops(model: ModelConfig) -> int:
    """One injection, a token."""
    return {"linear": 4, "gated": 4, "diagonal": 2}.get(model.injection, 0) * model.width**2


def _clean_flops(config: Config, layer: Number) -> Number:
    """What the clean rows of `concat` and `context` add, a token."""
    model, keys = config.model, _key_value_flops(config.model)
    if config.denoise.context == "inject":
        return 0
    if config.denoise.context == "context":
        return keys * (core_layers(config) + model.num_coda_layers)
    last = keys if model.num_coda_layers else 0  # nobody reads the last layer's output, so only its keys are made
    return layer * (core_layers(config) + max(model.num_coda_layers - 1, 0)) + last


def level_flops(config: Config) -> int:
    """The first half of the level embedding, a level; 0 where there is none."""
    return 2 * (config.cond_width or 0) * NUM_LEVEL_FEATURES


def _conditioning_flops(config: Config) -> float:
    """The modulations and the second half of the level embedding, a level; 0 where there is none."""
    cond = config.cond_width or 0
    return 2 * cond * cond + 2 * cond * 6 * config.model.width * core_layers(config)


# ----------------------------------------------------------------------------- sizes


def rows_of(config: Config) -> int:
    """Rows of a training sequence; of a task, those of a problem in the middle of its trained range; of an image its
    patches, and where it is named the row of its class."""
    if config.is_images:
        return picture_of(config).num_patches if config.generates else picture_of(config).num_rows
    return _cells(config.task.model_dump_json()) if config.is_task else config.data.length


def picture_of(config: Config) -> Picture | None:
    """The size of the images, which are read for it; None where there are none."""
    return _picture(config.images.model_dump_json(), config.model.patch_size) if config.is_images else None


def patch_numbers(config: Config) -> int:
    """Numbers in a patch of the images."""
    return picture_of(config).patch_numbers


@lru_cache
def _picture(images: str, patch: int) -> Picture:
    return prepare_labelled(ImageConfig.model_validate_json(images), patch).picture


@lru_cache
def _cells(task: str) -> int:
    return cells_of(TaskConfig.model_validate_json(task))


def mean_steps(config: Config) -> tuple[float, float]:
    """Mean loop steps (without gradient, with it) of a training step, or solver steps under `denoise`; those of a
    fixed-point solver at most, for nobody knows before when it has settled."""
    if config.objective == "truncated":
        return expected_depths(config.recurrence)
    if config.objective == "progressive":
        return expected_progressive_depths(config.recurrence)
    if config.objective == "one-step":
        segments = config.supervision.segments
        return float(segments * config.supervision.steps), float(segments)
    if config.objective == "fixed-point":
        return fixed_point_steps(config.fixed_point)
    if config.is_noprop:
        return 0.0, 1.0
    if config.objective == "forward-forward":  # the right class, and a wrong one
        return 0.0, 2.0
    if config.denoises:
        return carried_readings(config.denoise) + settling_readings(config.denoise), float(config.denoise.train_steps)
    return 0.0, 1.0 if config.objective == "masked" else float(config.main_depth)


def num_unrolls(config: Config) -> int:
    """How often a training step of a loop starts to unroll: from its first state, or from where it was."""
    if config.objective == "one-step":
        return config.supervision.segments
    return len(progressive_shares(config.recurrence)) if config.objective == "progressive" else 1


def num_readings(config: Config) -> float:
    """How often a training step of a loop reads out."""
    if config.objective == "forward-forward":
        return 0.0
    return mean_steps(config)[1] if config.recurrence.loss_on == "every" else float(num_unrolls(config))


def core_layers(config: Config) -> float:
    """Layers of the core that a loop step or a reading runs: a mean over its blocks, as often as each is drawn."""
    if not config.one_block_a_step or config.is_noprop:
        return config.step_layers
    return sum(share * layers for share, layers in zip(shares_of(config), config.block_layers, strict=True))


def shares_of(config: Config) -> list[float]:
    """How often each block of the core has its turn in training."""
    if config.objective == "masked":
        return masking.block_shares(config.blocks, config.masked.schedule).tolist()
    return block_shares(config.blocks, noise_from_config(config.denoise.noise)).tolist()


def num_levels(config: Config) -> int:
    """Noise levels of a sequence: one, or one a token."""
    return rows_of(config) if config.denoise.order != "together" and config.denoises else 1


def carry_size(config: Config) -> int:
    """Numbers a token that one solver step hands to the next."""
    return {"none": 0, "estimate": noisy_dim(config), "latent": config.model.width}[config.denoise.carry]


def noisy_dim(config: Config) -> int:
    return target_dim(config.denoise.target, config.model.width)


def embedded_dim(config: Config, num_classes: int) -> int:
    """Numbers of the embedding of a class that NoProp denoises."""
    return config.noprop.dim if config.noprop.embedding == "learned" else num_classes


def kv_width(model: ModelConfig) -> int:
    return model.kv_heads * (model.width // model.num_heads)
