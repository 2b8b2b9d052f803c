"""What a config costs before it is run: parameters, FLOPs of an optimiser step, bytes kept for backward.

Closed forms over the parts that run (`Part`), so nothing is allocated. A multiplication with its addition is two FLOPs;
only matrix products count; causal attention is counted as the half that is allowed, L (L + 1) / 2 scores a head;
a backward pass is twice its forward, so products that backward makes a second time (attention scores, logits) are
not counted: they buy memory, not training. Saved bytes are what autograd keeps for one micro-batch on one process,
parameters left out; under bf16 that includes the bf16 copies of the weights.
"""

from dataclasses import dataclass

import torch

from looped.config import Config, ModelConfig
from looped.diffusion.denoiser import Denoiser
from looped.diffusion.targets import target_dim
from looped.models.language import LanguageModel
from looped.objectives.depth import expected_depths

Number = int | float
WIDE = 4
"""Bytes of a float32: statistics, weights, gradients, optimiser state."""


@dataclass(frozen=True)
class Counts:
    """`count`'s answer. FLOPs are those of one optimiser step over all its sequences, bytes those of a micro-batch.

    parameters: unique numbers of the objective, the denoiser's own included. effective_parameters: those of the network
    that a step differentiates if it were written out, the core counted once for each of `recurrence.mean` loop steps;
    a denoiser trains one pass, so its two numbers are the same. training_bytes: weights, gradients, optimiser state,
    averaged weights and saved activations.
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
    tokens = config.training.batch_size * config.data.length
    saved = saved_bytes(config, vocab_size)
    states = 2 + (2 if config.optim.name == "adamw" else 1) + (config.optim.ema_decay > 0)
    rest = 0 if config.optim.name == "adamw" else parameters - _hidden_matrices(model)  # Muon leaves these to AdamW
    return Counts(
        parameters=parameters, core_parameters=core,
        effective_parameters=parameters + (0 if config.single_pass else core * (config.recurrence.mean - 1)),
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
    """Mean loop steps (without gradient, with it) of a training step; one with gradient under `denoise` and `ar`."""
    if config.objective == "truncated":
        return expected_depths(config.recurrence)
    return 0.0, float(config.recurrence.mean if config.objective == "full" else 1)


# ----------------------------------------------------------------------------- FLOPs


@dataclass(frozen=True)
class Part:
    """Something that runs for every token: FLOPs of one forward, and how often it runs without and with gradient."""

    name: str
    flops: Number
    no_grad: Number
    grad: Number


def parts_of(config: Config, vocab_size: int) -> list[Part]:
    """Everything with a matrix product in one training step; FLOPs are those of a token."""
    model, length = config.model, config.data.length
    layer, head = layer_flops(model, length), 2 * model.width * vocab_size
    no_grad, grad = mean_steps(config)
    parts = [Part("prelude", layer * model.num_prelude_layers, 0, 1),
             Part("injection", injection_flops(model), no_grad, grad),
             Part("core", layer * model.num_core_layers, no_grad, grad),
             Part("coda", layer * model.num_coda_layers, 0, 1), Part("head", head, 0, 1)]
    if config.objective == "denoise":
        parts += [Part("conditioning", _conditioning_flops(config) / length, 0, 1),
                  Part("noisy input", 2 * _target_dim(config) * model.width, 0, 1),
                  Part("clean rows", _clean_flops(config, layer), 0, 1)]
        if config.denoise.posterior:
            parts.append(Part("posterior", 2 * _target_dim(config) * vocab_size, 0, 1))
    return parts


def layer_flops(model: ModelConfig, length: int) -> float:
    """One forward of one layer, a token, under causal attention over `length` rows."""
    attention = 2 * 2 * model.width * (length + 1) / 2  # scores and mixing over the keys that causality leaves
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
    """The level embedding and the modulations, a sequence."""
    cond = config.denoise.cond_width
    return 2 * cond * (64 + cond) + 2 * cond * 6 * config.model.width * config.model.num_core_layers


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
    rows = config.training.batch_size // config.training.accumulation
    denoise, (_, steps) = config.objective == "denoise", mean_steps(config)
    token = _stack_bytes(model, model.num_prelude_layers, Kept(kept.narrow, WIDE))
    each, once = _injection_bytes(model, kept)
    token += once + steps * (each + _stack_bytes(model, model.num_core_layers, Kept(kept.narrow, kept.core)))
    token += _stack_bytes(model, model.num_coda_layers, Kept(kept.narrow, kept.narrow))
    token += _norm_bytes(model, kept.state) + _norm_bytes(model, kept.narrow) + kept.narrow * model.width  # head
    token += WIDE  # log-sum-exp
    token += _denoise_bytes(config, kept) if denoise else 0
    fixed = WIDE * length * (model.width // model.num_heads) * _rotations(config) + 8 * rows * (length + 1) + WIDE
    fixed += rows * _modulation_bytes(config, kept.narrow) if denoise else 0
    if denoise and config.denoise.posterior:  # the table, its norms twice; 1 / sigma^2
        fixed += WIDE * (vocab_size * (_target_dim(config) + 2) + rows)
    return round(rows * length * token + fixed + (weight_copies(config) if kept.narrow < WIDE else 0))


def streams(config: Config) -> "Streams":
    """Under bf16 a residual stream is float32 until something rounds it: a matrix product, or a norm on the sum."""
    model, narrow = config.model, 2 if config.training.precision == "bf16" else WIDE
    sandwich, denoise = model.block == "sandwich", config.objective == "denoise"
    e = narrow if sandwich and model.num_prelude_layers else WIDE
    core = {"linear": narrow, "diagonal": WIDE, "none": narrow if denoise else e}.get(model.injection, e)
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


def _denoise_bytes(config: Config, kept: Streams) -> int:
    """The noisy input (row, its norm, the scaled z) and the clean rows, a token."""
    model, context, narrow = config.model, config.denoise.context, kept.narrow
    noisy = (WIDE + narrow + WIDE * config.denoise.posterior) * _target_dim(config) + 2 * WIDE
    recorded = WIDE + narrow * model.width + _key_value_bytes(model, narrow)  # rows that only show keys and values
    if context == "inject":
        return noisy
    if context == "context":
        return noisy + kept.e * model.width + (model.num_core_layers + model.num_coda_layers) * recorded
    total = noisy + _stack_bytes(model, model.num_core_layers, Kept(narrow, kept.e))
    if model.num_coda_layers:
        total += _norm_bytes(model, narrow if model.block == "sandwich" else kept.e) + narrow * model.width + recorded
        total += _stack_bytes(model, model.num_coda_layers - 1, Kept(narrow, narrow))
    return total


def _modulation_bytes(config: Config, narrow: int) -> int:
    """Shift, scale and gate of every core layer and the level embedding, a sequence."""
    cond = config.denoise.cond_width
    layer = narrow * (6 + 2) * config.model.width + narrow * cond
    return config.model.num_core_layers * layer + WIDE * (64 + 3 * cond)


def _rotations(config: Config) -> int:
    """How many times the angles of the rows are made: for the prelude, the loop, the coda and the clean rows."""
    model = config.model
    clean = config.objective == "denoise" and config.denoise.context != "inject"
    return (model.num_prelude_layers > 0) + 1 + (model.num_coda_layers > 0) + clean


def weight_copies(config: Config) -> int:
    """Bytes of the bf16 copies that autocast's linear maps keep; SwiGLU's and gated output maps cast anew instead."""
    model, d = config.model, config.model.width
    denoise = config.objective == "denoise"
    layer = 2 * (2 * d**2 + 2 * d * _kv_width(model) + 2 * d * model.hidden)
    total = layer * (model.num_prelude_layers + model.num_core_layers + model.num_coda_layers)
    total += injection_flops(model)  # two bytes a weight, as two FLOPs a weight
    if denoise:
        gated = config.denoise.context != "concat"  # clean rows are not gated: theirs is a plain linear map
        total -= model.num_core_layers * 2 * d**2 * gated
        cond = config.denoise.cond_width
        total += 2 * (model.num_core_layers * 6 * d * cond + cond * cond)
    return total


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
