"""What a config costs before it is run: parameters, FLOPs of an optimiser step, bytes kept for backward.

Closed forms over the parts that run (`Part`), so nothing is allocated. A multiplication with its addition is two FLOPs;
only matrix products count; attention is counted as the pairs that its mask allows, L (L + 1) / 2 a head where causal,
also of blocks, for which SDPA's kernel works out all L x 2L;
a backward pass is twice its forward, so products that backward makes a second time (attention scores, logits) are
not counted: they buy memory, not training. Saved bytes are what autograd keeps for one micro-batch on one process,
parameters left out; under bf16 that includes the bf16 copies of the weights.
"""

from dataclasses import dataclass

import torch

from looped.config import Config, DenoiseConfig, ModelConfig
from looped.diffusion.denoiser import Denoiser
from looped.diffusion.targets import target_dim
from looped.models.language import LanguageModel
from looped.objectives.denoise import CARRY_SHARE
from looped.objectives.depth import expected_depths

Number = int | float
WIDE = 4
"""Bytes of a float32: statistics, weights, gradients, optimiser state."""
NUM_LEVEL_FEATURES = 64
"""Sines and cosines that `LevelEmbedding` reads a level by."""


@dataclass(frozen=True)
class Counts:
    """`count`'s answer. FLOPs are those of one optimiser step over all its sequences, bytes those of a micro-batch.

    parameters: unique numbers of the objective, the denoiser's own included. effective_parameters: those of the network
    that a step differentiates if it were written out, the core counted once for each of `recurrence.mean` loop steps or
    a denoiser's `train_steps`. training_bytes: weights, gradients, optimiser state, averaged weights and saved
    activations.
    """

    parameters: int
    core_parameters: int
    effective_parameters: int
    forward_flops: int
    step_flops: int
    saved_activation_bytes: int
    training_bytes: int


def count(config: Config, vocab_size: int) -> Counts:
    """The counts of a config with a vocabulary of `vocab_size` tokens; random depths enter by their means."""
    with torch.device("meta"):
        denoise = config.objective == "denoise"
        model = LanguageModel(config.model, vocab_size, cond_width=config.denoise.cond_width if denoise else None)
        whole = Denoiser(model, config.denoise) if denoise else model
    parameters, core = _numel(whole), _numel(model.recurrence.core)
    parts = parts_of(config, vocab_size)
    passes = {"denoise": config.denoise.train_steps, "ar": 1}.get(config.objective, config.recurrence.mean)
    tokens = config.training.batch_size * config.data.length
    saved = saved_bytes(config, vocab_size)
    states = 2 + (2 if config.optim.name == "adamw" else 1) + (config.optim.ema_decay > 0)
    rest = 0 if config.optim.name == "adamw" else parameters - _hidden_matrices(model)  # Muon leaves these to AdamW
    return Counts(
        parameters=parameters, core_parameters=core,
        effective_parameters=parameters + core * (passes - 1),
        forward_flops=round(tokens * sum(part.flops * (part.no_grad + part.grad) for part in parts)),
        step_flops=round(tokens * sum(part.flops * (part.no_grad + 3 * part.grad) for part in parts)),
        saved_activation_bytes=saved, training_bytes=WIDE * (parameters * states + rest) + saved)


def format_counts(counts: Counts) -> str:
    """A line a figure."""
    return "\n".join([
        f"parameters              {counts.parameters:,} ({counts.core_parameters:,} in the core)",
        f"effective parameters    {counts.effective_parameters:,} (the core once a mean loop step)",
        f"FLOPs, forward          {counts.forward_flops:.3e} an optimiser step",
        f"FLOPs, with backward    {counts.step_flops:.3e}",
        f"kept for backward       {counts.saved_activation_bytes / 1e6:,.1f} MB a micro-batch",
        f"memory for training     {counts.training_bytes / 1e6:,.1f} MB with weights, gradients and optimiser state"])


def mean_steps(config: Config) -> tuple[float, float]:
    """Mean loop steps (without gradient, with it) of a training step, or solver steps under `denoise`."""
    if config.objective == "truncated":
        return expected_depths(config.recurrence)
    if config.objective == "denoise":
        return first_readings(config.denoise), float(config.denoise.train_steps)
    return 0.0, float(config.recurrence.mean if config.objective == "full" else 1)


# ----------------------------------------------------------------------------- FLOPs


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
    table, head = 2 * _target_dim(config) * vocab_size, 2 * model.width * vocab_size
    levels, plain, posterior = _levels(config) / length, denoise.next_token_weight > 0, denoise.posterior
    own = denoise.carry == "estimate"
    return [
        Part("clean rows", _clean_flops(config, clean), 0, 1),
        Part("level", 2 * denoise.cond_width * NUM_LEVEL_FEATURES * levels, first + steps / 2, steps / 2),
        Part("conditioning", _conditioning_flops(config) * levels, first, steps),
        Part("noisy input", 2 * _target_dim(config) * model.width, first, steps),
        Part("expected embedding", (table + head) * denoise.evidence_in, first, steps),
        Part("handed on", 2 * _carry_size(config) * model.width, first + 0.5, steps - 0.5),  # at first, zeros
        Part("injection", injection_flops(model), first, steps + plain),
        Part("core", noisy * model.num_core_layers, first, steps),
        Part("coda", noisy * model.num_coda_layers, first, steps),
        Part("plain step", clean * (model.num_core_layers + model.num_coda_layers), 0, plain),
        Part("head", head, 0, steps + plain), Part("posterior", table * posterior, 0, steps),
        Part("logits", head + table * posterior, first, steps - 1),
        Part("estimate", table, first * own, (steps - 1) * (1 + own))]  # of the bridge, and of what is handed on


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
    return 2 * 2 * model.width * _kv_width(model)


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


# ----------------------------------------------------------------------------- bytes kept for backward


@dataclass(frozen=True)
class Kept:
    """Bytes a number takes: in matrix products (`narrow`), in the residual stream that enters some layers."""

    narrow: int
    stream: int


@dataclass(frozen=True)
class Streams:
    """Bytes a number takes: in matrix products, in the prelude's output, inside the core and in its output."""

    narrow: int
    e: int
    core: int
    state: int


def saved_bytes(config: Config, vocab_size: int) -> int:
    """What autograd keeps for one micro-batch, in bytes: linear in the loop steps that carry gradient."""
    model, length, kept = config.model, config.data.length, streams(config)
    rows, (_, steps) = config.training.batch_size // config.training.accumulation, mean_steps(config)
    token = _stack_bytes(model, model.num_prelude_layers, Kept(kept.narrow, WIDE))
    fixed = WIDE * length * (model.width // model.num_heads) * _rotations(config) + 8 * rows * (length + 1) + WIDE
    if config.objective == "denoise":
        token += _denoiser_bytes(config, vocab_size)
        fixed += rows * _levels(config) * _level_bytes(config) + _table_bytes(config, vocab_size) + _mask_bytes(config)
    else:
        each, once = _injection_bytes(model, kept)
        token += once + steps * (each + _stack_bytes(model, model.num_core_layers, Kept(kept.narrow, kept.core)))
        token += _read_out_bytes(model, kept)
    return round(rows * length * token + fixed + (weight_copies(config, vocab_size) if kept.narrow < WIDE else 0))


def streams(config: Config, *, noisy: bool | None = None) -> "Streams":
    """Under bf16 a residual stream is float32 until something rounds it: a matrix product, or a norm on the sum. Noisy
    rows enter the loop by one, the state of a plain step does not."""
    model, narrow = config.model, 2 if config.training.precision == "bf16" else WIDE
    noisy = config.objective == "denoise" if noisy is None else noisy
    sandwich = model.block == "sandwich"
    e = narrow if sandwich and model.num_prelude_layers else WIDE
    if noisy and config.denoise.block_size > 1:
        e = WIDE  # a row's place is added in float32
    core = {"linear": narrow, "diagonal": WIDE, "none": narrow if noisy else e}.get(model.injection, e)
    return Streams(narrow, e, core, state=narrow if sandwich else core)


def layer_bytes(model: ModelConfig, kept: Kept) -> int:
    """What one layer keeps, a token: its input, both norms' outputs, q, k, v, the mix, SwiGLU's halves; sandwich also
    keeps the two sums. Statistics are one float32 a row and a head."""
    d, narrow = model.width, kept.narrow
    sandwich = model.block == "sandwich"
    total = kept.stream * d + narrow * (4 * d + 2 * _kv_width(model)) + WIDE * model.num_heads
    total += narrow * 2 * model.hidden + 2 * WIDE
    total += kept.stream * d + (2 * narrow * d + 2 * WIDE if sandwich else 0)
    if model.qk_norm:
        total += narrow * (d + _kv_width(model)) + WIDE * (model.num_heads + model.kv_heads)
    return total


def _stack_bytes(model: ModelConfig, num_layers: int, kept: Kept) -> int:
    if not num_layers:
        return 0
    later = Kept(kept.narrow, kept.narrow if model.block == "sandwich" else kept.stream)
    return layer_bytes(model, kept) + (num_layers - 1) * layer_bytes(model, later)


def _read_out_bytes(model: ModelConfig, kept: "Streams") -> int:
    """From the core's output to the loss: norm, coda, norm, what the head reads, a log-sum-exp."""
    coda = _stack_bytes(model, model.num_coda_layers, Kept(kept.narrow, kept.narrow))
    return coda + _norm_bytes(model, kept.state) + _norm_bytes(model, kept.narrow) + kept.narrow * model.width + WIDE


def _norm_bytes(model: ModelConfig, stream: int) -> int:
    return stream * model.width + WIDE


def _injection_bytes(model: ModelConfig, kept: Streams) -> tuple[int, int]:
    """(each loop step, once), a token. linear: both inputs side by side. gated: those, the gate (again where it is
    widened) and the state, and e. diagonal: the state and W e, and e."""
    d, rounded = model.width, kept.e != kept.narrow
    if model.injection == "linear":
        return 2 * kept.narrow * d, 0
    if model.injection == "gated":
        return (3 * kept.narrow + kept.state + WIDE * rounded) * d, kept.e * d
    if model.injection == "diagonal":
        return (kept.state + kept.narrow * (1 + rounded)) * d, 0 if rounded else kept.e * d
    return 0, 0


def _key_value_bytes(model: ModelConfig, narrow: int) -> int:
    own = narrow * _kv_width(model) + WIDE * model.kv_heads if model.qk_norm else 0
    return 2 * narrow * _kv_width(model) + own


def _denoiser_bytes(config: Config, vocab_size: int) -> int:
    """All that a denoiser keeps a token: the clean rows, each reading, what lies between two, and the plain step."""
    model, denoise, kept, dim = config.model, config.denoise, streams(config), _target_dim(config)
    steps, (each, once) = denoise.train_steps, _injection_bytes(model, kept)
    total = _clean_bytes(config) + WIDE * (dim + 2)  # the target's row and its norm twice
    total += steps * (each + _noisy_bytes(config, vocab_size) + _read_out_bytes(model, kept))
    total += once * (steps if denoise.block_size > 1 else 1) + _carry_bytes(config)
    own = denoise.carry == "estimate"
    between = WIDE * vocab_size * (denoise.target.learned_logit_scale + 1 + own)  # logits, probabilities of each bridge
    total += (steps - 1) * (between + WIDE * dim * denoise.posterior)
    return total + (_plain_bytes(config) if denoise.next_token_weight else 0)


def _noisy_bytes(config: Config, vocab_size: int) -> int:
    """What goes into a reading and its core, a token; of blocks also that the context's keys and values are joined to
    the rows' own in each layer, and of levels by token the branches before their gates."""
    model, denoise, kept = config.model, config.denoise, streams(config)
    total = (kept.narrow + WIDE * denoise.posterior) * _target_dim(config)
    total += _stack_bytes(model, model.num_core_layers, Kept(kept.narrow, kept.core))
    if denoise.block_size > 1:
        total += (model.num_core_layers + model.num_coda_layers) * 2 * kept.narrow * _kv_width(model)
    if _levels(config) > 1:
        total += model.num_core_layers * 2 * kept.narrow * model.width
    if denoise.evidence_in:
        total += WIDE * _target_dim(config) + (WIDE + (kept.narrow if kept.narrow < WIDE else 0)) * vocab_size
    return total


def _carry_bytes(config: Config) -> int:
    """What the readings of a training step are handed, a token: zeros at first. In float32 a latent is the state that
    the reading before has kept anyhow."""
    later = config.denoise.carry == "estimate" or config.training.precision == "bf16"
    return streams(config).narrow * _carry_size(config) * (1 + (config.denoise.train_steps - 1) * later)


def _plain_bytes(config: Config) -> int:
    model, kept = config.model, streams(config, noisy=False)
    core = _stack_bytes(model, model.num_core_layers, Kept(kept.narrow, kept.core))
    return _injection_bytes(model, kept)[0] + core + _read_out_bytes(model, kept)


def _clean_bytes(config: Config) -> int:
    """The clean rows, a token."""
    model, context, kept = config.model, config.denoise.context, streams(config, noisy=False)
    recorded = WIDE + kept.narrow * model.width + _key_value_bytes(model, kept.narrow)  # rows that only show these
    if config.denoise.block_size > 1:
        recorded -= 2 * kept.narrow * _kv_width(model)  # kept where they are joined to others
    if context == "inject":
        return 0
    if context == "context":
        return kept.e * model.width + (model.num_core_layers + model.num_coda_layers) * recorded
    total = _stack_bytes(model, model.num_core_layers, Kept(kept.narrow, kept.e))
    if model.num_coda_layers:
        stream = kept.narrow if model.block == "sandwich" else kept.e
        total += _norm_bytes(model, stream) + kept.narrow * model.width + recorded
        total += _stack_bytes(model, model.num_coda_layers - 1, Kept(kept.narrow, kept.narrow))
    return total


def _level_bytes(config: Config) -> int:
    """Shift, scale and gate of every core layer, the level embedding, and what z is multiplied by; a level."""
    denoise, narrow = config.denoise, streams(config).narrow
    cond, steps = denoise.cond_width, denoise.train_steps
    layer = narrow * (6 + 2) * config.model.width + narrow * cond
    reading = config.model.num_core_layers * layer + narrow * (NUM_LEVEL_FEATURES + 3 * cond)
    factors = steps * (1 + denoise.posterior + denoise.evidence_in) + (steps - 1) * (2 + denoise.posterior) + 1
    return steps * reading + WIDE * factors


def _table_bytes(config: Config, vocab_size: int) -> int:
    """The table of targets, made anew for everything that reads it, and its norms twice."""
    denoise, steps = config.denoise, config.denoise.train_steps
    between = denoise.posterior + 1 + (denoise.carry == "estimate")
    times = steps * (denoise.posterior + denoise.evidence_in) + (steps - 1) * between
    return WIDE * vocab_size * (_target_dim(config) + 2) * times


def _mask_bytes(config: Config) -> int:
    """Blocks are attended to under a mask of queries x keys, which every layer keeps in its own precision."""
    model, length = config.model, config.data.length
    if config.denoise.block_size == 1:
        return 0
    layers = model.num_core_layers + model.num_coda_layers
    return config.denoise.train_steps * layers * streams(config).narrow * 2 * length**2


def _rotations(config: Config) -> int:
    """How many times the angles of the rows are made: for the prelude, each loop and coda, and the clean rows."""
    model, denoise = config.model, config.denoise if config.objective == "denoise" else None
    passes = denoise.train_steps + (denoise.next_token_weight > 0) if denoise else 1
    clean = denoise is not None and denoise.context != "inject"
    return (model.num_prelude_layers > 0) + passes * (1 + (model.num_coda_layers > 0)) + clean


def weight_copies(config: Config, vocab_size: int) -> int:
    """Bytes of the bf16 copies that autocast's linear maps keep; SwiGLU's and gated output maps cast anew instead."""
    model, d = config.model, config.model.width
    layer = 2 * (2 * d**2 + 2 * d * _kv_width(model) + 2 * d * model.hidden)
    total = layer * (model.num_prelude_layers + model.num_core_layers + model.num_coda_layers)
    total += injection_flops(model)  # two bytes a weight, as two FLOPs a weight
    return total + (_denoiser_copies(config, vocab_size) if config.objective == "denoise" else 0)


def _denoiser_copies(config: Config, vocab_size: int) -> int:
    model, denoise, d, cond = config.model, config.denoise, config.model.width, config.denoise.cond_width
    # A gate of a sequence is part of the map; clean rows, a plain step and gates of a token leave a plain linear map.
    gated = denoise.context != "concat" and not denoise.next_token_weight and _levels(config) == 1
    total = 2 * (model.num_core_layers * 6 * d * cond + cond * cond) - model.num_core_layers * 2 * d**2 * gated
    several = denoise.train_steps > 1  # what zeros, or a reading without gradient, hand on needs no copy
    total += 2 * d * (_target_dim(config) + several * (_carry_size(config) + vocab_size))
    return total + 2 * d * vocab_size * denoise.evidence_in * denoise.train_steps


def _levels(config: Config) -> int:
    """Noise levels of a sequence: one, or one a token."""
    by_token = config.denoise.noise.share_per_token or config.denoise.order != "together"
    return config.data.length if by_token else 1


def _carry_size(config: Config) -> int:
    """Numbers a token that one solver step hands to the next."""
    return {"none": 0, "estimate": _target_dim(config), "latent": config.model.width}[config.denoise.carry]


def _target_dim(config: Config) -> int:
    return target_dim(config.denoise.target, config.model.width)


def _kv_width(model: ModelConfig) -> int:
    return model.kv_heads * (model.width // model.num_heads)


def _numel(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _hidden_matrices(model: LanguageModel) -> int:
    """Numbers in the matrices of the repeated layers, which Muon takes."""
    layers = [*model.prelude, *model.recurrence.core.blocks, *model.coda]
    return sum(m.weight.numel() for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear))
