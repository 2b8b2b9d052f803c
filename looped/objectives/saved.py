"""What autograd keeps for the backward pass of one micro-batch on one process, in bytes, in closed form.

Parameters are left out; under bf16 the bf16 copies of the weights are in.
"""

from dataclasses import dataclass, replace

from looped.config import Config
from looped.config.model import ModelConfig
from looped.objectives.flops import (
    NUM_LEVEL_FEATURES,
    carry_size,
    core_layers,
    embedded_dim,
    injection_flops,
    kv_width,
    mean_steps,
    noisy_dim,
    num_levels,
    num_readings,
    num_unrolls,
    patch_numbers,
    picture_of,
    rows_of,
)
from looped.objectives.rivals.preserving import SCHEDULE_WIDTH

WIDE = 4
"""Bytes of a float32: statistics, weights, gradients, optimiser state."""


@dataclass(frozen=True)
class Kept:
    """Bytes a number takes: in matrix products (`narrow`), in the residual stream that enters some layers; whether
    these keep their inputs alone."""

    narrow: int
    stream: int
    checkpointed: bool = False


@dataclass(frozen=True)
class Streams:
    """Bytes a number takes: in matrix products, in the prelude's output, inside the core and in its output."""

    narrow: int
    e: int
    core: int
    state: int
    checkpointed: bool

    def enter(self, stream: int) -> Kept:
        """Layers that a residual stream of so many bytes a number enters."""
        return Kept(self.narrow, stream, self.checkpointed)


def saved_bytes(config: Config, vocab_size: int) -> int:
    """What autograd keeps for one micro-batch, in bytes: linear in the loop steps that carry gradient. Of `blockwise`
    the mean over the blocks, as often as each is drawn; where what they share is frozen, this is what it would be if it
    were not, so the most that can be."""
    if config.generates:
        return pixel_bytes(config)
    model, length, kept = config.model, rows_of(config), streams(config)
    rows, (_, steps) = config.training.batch_size // config.training.accumulation, mean_steps(config)
    token = _stack_bytes(model, model.num_prelude_layers, kept.enter(WIDE))
    # Sequences whose positions are given have angles of their own.
    placed = rows if config.sees_all and config.objective != "masked" else 1
    fixed = WIDE * length * (model.width // model.num_heads) * _rotations(config) * placed + _batch_bytes(config, rows)
    if config.denoises:
        token += _denoiser_bytes(config, vocab_size)
        fixed += rows * num_levels(config) * _level_bytes(config)
        fixed += _table_bytes(config, vocab_size) + _mask_bytes(config)
    else:
        each, once = _injection_bytes(model, kept)
        if config.objective == "masked":
            once = 0  # e is the state that the step starts from, and kept as that
            fixed += rows * (_conditioning_bytes(config) + WIDE)  # the last: the weight of the loss
        token += once + steps * (each + _stack_bytes(model, core_layers(config), kept.enter(kept.core)))
        token += num_readings(config) * _read_out_bytes(model, kept)
    if config.is_noprop:
        fixed += rows * _noprop_bytes(config, vocab_size) + _schedule_bytes(config, rows)
    if config.objective == "forward-forward":  # the first input and each layer's output, to be squared
        token += steps * WIDE * model.width * (model.num_core_layers + 1)
    if config.objective == "one-step":
        token += num_readings(config) * WIDE  # the norm that the halting head reads through
        fixed += num_readings(config) * rows * WIDE * model.width
    return round(rows * length * token + fixed + (weight_copies(config, vocab_size) if kept.narrow < WIDE else 0))


def pixel_bytes(config: Config) -> int:
    """Of a denoiser of pixels: the patches, the layers, the last norm and map, the error; of each image its noise
    level, class and modulations; the angles of all rows."""
    model, cond, kept = config.model, config.denoise.cond_width, streams(config)
    rows, narrow = config.training.batch_size // config.training.accumulation, kept.narrow
    length, size = rows_of(config), patch_numbers(config)
    last = narrow if model.block == "sandwich" else WIDE
    token = (narrow + WIDE) * size + _stack_bytes(model, core_layers(config), kept.enter(WIDE))
    token += _norm_bytes(model, last) + narrow * model.width
    image = _conditioning_bytes(config) + (WIDE - narrow) * cond  # level and class are added in float32
    image += narrow * (cond + 2 * model.width) + WIDE + 8
    angles = WIDE * length * (model.width // model.num_heads)
    return round(rows * (length * token + image) + angles + (_pixel_copies(config) if narrow < WIDE else 0))


def _pixel_copies(config: Config) -> float:
    """Bytes of the bf16 copies of weights; a gated output map casts anew, and the first maps need none."""
    around = 2 * config.model.width * (2 * config.denoise.cond_width + patch_numbers(config))
    return core_layers(config) * _layer_copies(config) + _conditioning_copies(config, gated=True) + around


def _batch_bytes(config: Config, rows: int) -> int:
    """Tokens of 64 bits: of a text once, of a problem as inputs and targets, with what is sought as a mask; of a masked
    text also what is seen, and a mask; of an image its patches instead of the inputs."""
    length, picture = rows_of(config), picture_of(config)
    if picture is not None:
        return rows * (WIDE * (length - 1) * picture.patch_numbers + length * (8 + 1)) + WIDE
    if config.objective == "masked":
        return rows * (8 * (length + 1) + length * (8 + 1)) + WIDE
    return rows * length * (8 + 8 + 1) + WIDE if config.is_task else 8 * rows * (length + 1) + WIDE


def streams(config: Config, *, noisy: bool | None = None) -> "Streams":
    """Under bf16 a residual stream is float32 until something rounds it: a matrix product, or a norm on the sum. Noisy
    rows enter the loop by one, the state of a plain step does not; a fixed-point solver's states are float32."""
    model, narrow = config.model, 2 if config.training.precision == "bf16" else WIDE
    noisy = config.denoises if noisy is None else noisy
    sandwich = model.block == "sandwich"
    e = narrow if sandwich and model.num_prelude_layers else WIDE
    if noisy and config.denoise.block_size > 1:
        e = WIDE  # a row's place is added in float32
    core = {"linear": narrow, "diagonal": WIDE, "none": narrow if noisy else e}.get(model.injection, e)
    state = narrow if sandwich else core
    return Streams(narrow, e, core, WIDE if config.objective == "fixed-point" else state,
                   config.training.checkpoint_activations)


def layer_bytes(model: ModelConfig, kept: Kept) -> int:
    """What one layer keeps, a token: its input, both norms' outputs, q, k, v, the mix, what the feed-forward net's
    activation is taken of; sandwich also keeps the two sums. Statistics are one float32 a row and a head."""
    d, narrow = model.width, kept.narrow
    if kept.checkpointed:
        return kept.stream * d
    sandwich = model.block == "sandwich"
    total = kept.stream * d + narrow * (4 * d + 2 * kv_width(model)) + WIDE * model.num_heads
    total += narrow * model.ffn_inputs + 2 * WIDE
    total += kept.stream * d + (2 * narrow * d + 2 * WIDE if sandwich else 0)
    if model.qk_norm:
        total += narrow * (d + kv_width(model)) + WIDE * (model.num_heads + model.kv_heads)
    return total


def _stack_bytes(model: ModelConfig, num_layers: float, kept: Kept) -> float:
    if not num_layers:
        return 0
    later = replace(kept, stream=kept.narrow if model.block == "sandwich" else kept.stream)
    return layer_bytes(model, kept) + (num_layers - 1) * layer_bytes(model, later)


def _read_out_bytes(model: ModelConfig, kept: "Streams") -> int:
    """From the core's output to the loss: norm, coda, norm, what the head reads, a log-sum-exp."""
    coda = _stack_bytes(model, model.num_coda_layers, kept.enter(kept.narrow))
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
    own = narrow * kv_width(model) + WIDE * model.kv_heads if model.qk_norm else 0
    return 2 * narrow * kv_width(model) + own


def _denoiser_bytes(config: Config, vocab_size: int) -> float:
    """Bytes that a denoiser keeps for each token: the clean rows, each reading, and what lies between two."""
    model, denoise, kept, dim = config.model, config.denoise, streams(config), noisy_dim(config)
    steps, (each, once) = denoise.train_steps, _injection_bytes(model, kept)
    total = _clean_bytes(config) + WIDE * (dim + 2)  # the target's row and its norm twice
    total += steps * (each + _noisy_bytes(config, vocab_size) + _read_out_bytes(model, kept))
    total += once * (steps if denoise.block_size > 1 else 1) + _carry_bytes(config)
    between = WIDE * vocab_size * (denoise.target.learned_logit_scale + 1)  # logits, probabilities of the bridge
    total += (steps - 1) * (between + WIDE * dim * denoise.posterior)
    return total


def _noisy_bytes(config: Config, vocab_size: int) -> float:
    """What goes into a reading and its core, a token; of blocks also that the context's keys and values are joined to
    the rows' own in each layer, and of levels by token the branches before their gates."""
    model, denoise, kept = config.model, config.denoise, streams(config)
    total = (kept.narrow + WIDE * denoise.posterior) * noisy_dim(config)
    total += _stack_bytes(model, core_layers(config), kept.enter(kept.core))
    if denoise.block_size > 1 and not kept.checkpointed:
        total += (core_layers(config) + model.num_coda_layers) * 2 * kept.narrow * kv_width(model)
    if num_levels(config) > 1 and not kept.checkpointed:
        total += core_layers(config) * 2 * kept.narrow * model.width
    if denoise.evidence_in:
        total += WIDE * noisy_dim(config) + (WIDE + (kept.narrow if kept.narrow < WIDE else 0)) * vocab_size
    return total


def _carry_bytes(config: Config) -> int:
    """What the readings of a training step are handed, a token: zeros at first. In float32 a latent is the state that
    the reading before has kept anyhow."""
    later = config.denoise.carry == "estimate" or config.training.precision == "bf16"
    return streams(config).narrow * carry_size(config) * (1 + (config.denoise.train_steps - 1) * later)


def _clean_bytes(config: Config) -> float:
    """The clean rows, a token."""
    model, context, kept = config.model, config.denoise.context, streams(config, noisy=False)
    recorded = WIDE + kept.narrow * model.width + _key_value_bytes(model, kept.narrow)  # rows that only show these
    if config.denoise.block_size > 1 and not kept.checkpointed:
        recorded -= 2 * kept.narrow * kv_width(model)  # kept where they are joined to others
    if context == "inject":
        return 0
    if context == "context":
        return kept.e * model.width + (core_layers(config) + model.num_coda_layers) * recorded
    total = _stack_bytes(model, core_layers(config), Kept(kept.narrow, kept.e))
    if model.num_coda_layers:
        stream = kept.narrow if model.block == "sandwich" else kept.e
        total += _norm_bytes(model, stream) + kept.narrow * model.width + recorded
        total += _stack_bytes(model, model.num_coda_layers - 1, Kept(kept.narrow, kept.narrow))
    return total


def _conditioning_bytes(config: Config) -> float:
    """Shift, scale and gate of every core layer, and the level embedding; a level. 0 where the core is not told."""
    cond, narrow = config.cond_width, streams(config).narrow
    if cond is None:
        return 0
    layer = narrow * (6 + 2) * config.model.width + narrow * cond
    layer *= not config.training.checkpoint_activations
    return core_layers(config) * layer + narrow * (NUM_LEVEL_FEATURES + 3 * cond)


def _noprop_bytes(config: Config, num_classes: int) -> float:
    """Beside the network, of an image: z in and u out, what is read of the class, and a level."""
    model, narrow, dim = config.model, streams(config).narrow, embedded_dim(config, num_classes)
    return _conditioning_bytes(config) + 4 * WIDE * dim + 2 * WIDE * num_classes + narrow * (model.width + dim)


def _schedule_bytes(config: Config, rows: int) -> int:
    """Of a learned schedule: float64 vectors of its width, so many of an image and so many of all."""
    learned = config.noprop.schedule_of(config.objective) == "learned" and config.objective != "noprop-fm"
    return (11 * rows + 100) * 8 * SCHEDULE_WIDTH if learned else 0


def _level_bytes(config: Config) -> float:
    """What conditions the core, and what z is multiplied by; a level."""
    denoise, steps = config.denoise, config.denoise.train_steps
    factors = steps * (1 + denoise.posterior + denoise.evidence_in) + (steps - 1) * (2 + denoise.posterior) + 1
    return steps * _conditioning_bytes(config) + WIDE * factors


def _table_bytes(config: Config, vocab_size: int) -> int:
    """The table of targets, made anew for everything that reads it, and its norms twice."""
    denoise, steps = config.denoise, config.denoise.train_steps
    times = steps * (denoise.posterior + denoise.evidence_in) + (steps - 1) * (denoise.posterior + 1)
    return WIDE * vocab_size * (noisy_dim(config) + 2) * times


def _mask_bytes(config: Config) -> float:
    """Blocks are attended to under a mask of queries x keys, which every layer keeps in its own precision."""
    model, length = config.model, rows_of(config)
    if config.denoise.block_size == 1 or config.training.checkpoint_activations:
        return 0
    layers = core_layers(config) + model.num_coda_layers
    return config.denoise.train_steps * layers * streams(config).narrow * 2 * length**2


def _rotations(config: Config) -> float:
    """How many times the angles of the rows are made: for the prelude, each loop and coda, and the clean rows."""
    model, denoise = config.model, config.denoise if config.denoises else None
    if denoise is None:
        loops = mean_steps(config)[1] if config.objective == "fixed-point" else num_unrolls(config)
        return (model.num_prelude_layers > 0) + loops + num_readings(config) * (model.num_coda_layers > 0)
    passes = denoise.train_steps
    clean = denoise.context != "inject"
    return (model.num_prelude_layers > 0) + passes * (1 + (model.num_coda_layers > 0)) + clean


def weight_copies(config: Config, vocab_size: int) -> float:
    """Bytes of the bf16 copies that autocast's linear maps keep; those after an activation and gated ones cast anew."""
    model, layer = config.model, _layer_copies(config)
    blocks = 1 if config.denoises or config.one_block_a_step else config.blocks.num
    total = layer * (model.num_prelude_layers + blocks * core_layers(config) + model.num_coda_layers)
    total += blocks * injection_flops(model)  # two bytes a weight, as two FLOPs a weight
    if config.objective == "masked" and config.cond_width:
        return total + _conditioning_copies(config, gated=True)
    return total + (_denoiser_copies(config, vocab_size) if config.denoises else 0)


def _layer_copies(config: Config) -> int:
    model, d = config.model, config.model.width
    copies = 2 * (2 * d**2 + 2 * d * kv_width(model) + d * model.ffn_inputs)
    return copies * (not streams(config).checkpointed)


def _conditioning_copies(config: Config, *, gated: bool) -> float:
    """Those of the modulations and of the level embedding; a gate of a sequence is part of the output map, which then
    needs none."""
    d, cond = config.model.width, config.cond_width
    inside = core_layers(config) * (not streams(config).checkpointed)
    return 2 * (inside * 6 * d * cond + cond * cond) - inside * 2 * d**2 * gated


def _denoiser_copies(config: Config, vocab_size: int) -> float:
    denoise, d = config.denoise, config.model.width
    # Clean rows and gates of a token leave a plain linear map.
    gated = denoise.context != "concat" and num_levels(config) == 1
    total = _conditioning_copies(config, gated=gated)
    several = denoise.train_steps > 1  # what zeros, or a reading without gradient, hand on needs no copy
    total += 2 * d * (noisy_dim(config) + several * (carry_size(config) + vocab_size))
    return total + 2 * d * vocab_size * denoise.evidence_in * denoise.train_steps
