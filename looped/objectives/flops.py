"""FLOPs of a training step, in closed form over the parts that run; and the sizes that the closed forms share.

A multiplication with its addition is two FLOPs; only matrix products count; attention is counted as the pairs that its
mask allows, L (L + 1) / 2 a head where causal, also of blocks, for which SDPA's kernel works out all L x 2L. A backward
pass is twice its forward, so products that backward makes a second time (attention scores, logits) are not counted:
they buy memory, not training.
"""

from dataclasses import dataclass

from looped.config import Config, ModelConfig
from looped.config_denoise import DenoiseConfig
from looped.diffusion.targets import target_dim
from looped.objectives.denoise import CARRY_SHARE
from looped.objectives.depth import expected_depths

Number = int | float
NUM_LEVEL_FEATURES = 64
"""Sines and cosines that `LevelEmbedding` reads a level by."""


@dataclass(frozen=True)
class Part:
    """Something that runs for every token: FLOPs of one forward, and how often it runs without and with gradient. Half
    of each where the weight needs a gradient and the input none."""

    name: str
    flops: Number
    no_grad: Number
    grad: Number


def parts_of(config: Config, vocab_size: int) -> list[Part]:
    """Everything with a matrix product in one training step; FLOPs are those of a token."""
    model, length = config.model, config.data.length
    layer, head = layer_flops(model, length), 2 * model.width * vocab_size
    prelude = Part("prelude", layer * model.num_prelude_layers, 0, 1)
    if config.objective == "denoise":
        return [prelude, *_denoiser_parts(config, vocab_size)]
    no_grad, grad = mean_steps(config)
    return [prelude, Part("injection", injection_flops(model), no_grad, grad),
            Part("core", layer * model.num_core_layers, no_grad, grad),
            Part("coda", layer * model.num_coda_layers, 0, 1), Part("head", head, 0, 1)]


def _denoiser_parts(config: Config, vocab_size: int) -> list[Part]:
    """Readings of the noisy rows, what lies between two of them, and what is read beside them."""
    model, denoise, length = config.model, config.denoise, config.data.length
    first, steps = mean_steps(config)
    clean, noisy = layer_flops(model, length), layer_flops(model, length, block=denoise.block_size)
    table, head = 2 * noisy_dim(config) * vocab_size, 2 * model.width * vocab_size
    levels, plain, posterior = num_levels(config) / length, denoise.next_token_weight > 0, denoise.posterior
    own = denoise.carry == "estimate"
    return [
        Part("clean rows", _clean_flops(config, clean), 0, 1),
        Part("level", 2 * denoise.cond_width * NUM_LEVEL_FEATURES * levels, first + steps / 2, steps / 2),
        Part("conditioning", _conditioning_flops(config) * levels, first, steps),
        Part("noisy input", 2 * noisy_dim(config) * model.width, first, steps),
        Part("expected embedding", (table + head) * denoise.evidence_in, first, steps),
        Part("handed on", 2 * carry_size(config) * model.width, first + 0.5, steps - 0.5),  # at first, zeros
        Part("injection", injection_flops(model), first, steps + plain),
        Part("core", noisy * model.num_core_layers, first, steps),
        Part("coda", noisy * model.num_coda_layers, first, steps),
        Part("plain step", clean * (model.num_core_layers + model.num_coda_layers), 0, plain),
        Part("head", head, 0, steps + plain), Part("posterior", table * posterior, 0, steps),
        Part("logits", head + table * posterior, first, steps - 1),
        Part("estimate", table, first * own, steps - 1)]


def first_readings(denoise: DenoiseConfig) -> float:
    """Mean readings without gradient of a training step."""
    return CARRY_SHARE if denoise.carry != "none" and denoise.train_steps == 1 else 0.0


def layer_flops(model: ModelConfig, length: int, *, block: int = 1) -> float:
    """One forward of one layer, a token, over `length` rows that see what they may: under causal attention, or each its
    block and the clean rows up to the first of it. A row's own key beside a context is no matrix product."""
    seen = (length - block) / 2 + 1 + (block if block > 1 else 0)
    attention = 2 * 2 * model.width * seen  # scores and mixing
    return 4 * model.width**2 + _key_value_flops(model) + attention + 6 * model.width * model.hidden


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
        return keys * (model.num_core_layers + model.num_coda_layers)
    last = keys if model.num_coda_layers else 0  # nobody reads the last layer's output, so only its keys are made
    return layer * (model.num_core_layers + max(model.num_coda_layers - 1, 0)) + last


def _conditioning_flops(config: Config) -> int:
    """The modulations and the second half of the level embedding, a level."""
    cond = config.denoise.cond_width
    return 2 * cond * cond + 2 * cond * 6 * config.model.width * config.model.num_core_layers


# ----------------------------------------------------------------------------- sizes


def mean_steps(config: Config) -> tuple[float, float]:
    """Mean loop steps (without gradient, with it) of a training step, or solver steps under `denoise`."""
    if config.objective == "truncated":
        return expected_depths(config.recurrence)
    if config.objective == "denoise":
        return first_readings(config.denoise), float(config.denoise.train_steps)
    return 0.0, float(config.recurrence.mean if config.objective == "full" else 1)


def num_levels(config: Config) -> int:
    """Noise levels of a sequence: one, or one a token."""
    by_token = config.denoise.noise.share_per_token or config.denoise.order != "together"
    return config.data.length if by_token else 1


def carry_size(config: Config) -> int:
    """Numbers a token that one solver step hands to the next."""
    return {"none": 0, "estimate": noisy_dim(config), "latent": config.model.width}[config.denoise.carry]


def noisy_dim(config: Config) -> int:
    return target_dim(config.denoise.target, config.model.width)


def kv_width(model: ModelConfig) -> int:
    return model.kv_heads * (model.width // model.num_heads)
