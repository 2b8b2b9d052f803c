"""The looped language model: prelude, weight-tied core, coda, as `encode`, `step`, `decode`.

Huginn's structure (Geiping et al. 2025, arXiv 2502.05171): `e = prelude(sqrt(D) embed(ids))`, the core applied any
number of times with `e` injected, one final norm used after the loop and again after the coda, a tied head.
"""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from looped.config import Config
from looped.config.model import ModelConfig
from looped.data.image_batches import ImageSpec
from looped.errors import UserError, did_you_mean
from looped.import_path import class_at
from looped.nn.blocks import Core, LayerStack, LoopState, MissingBlock, OwnBlock, run_layers
from looped.nn.boundary import NUM_FEATURES, STEP_EMBEDDINGS, Boundary, ScaledUpdate, StepModulation, Streams
from looped.nn.cache import Cache
from looped.nn.checks import ids_of, kind_of, require, whole_number
from looped.nn.conditioning import LevelEmbedding
from looped.nn.exit_gate import ExitGate
from looped.nn.injection import Diagonal, build_injection
from looped.nn.layers import (
    Plain,
    RMSNorm,
    Rotary,
    TransformerLayer,
    linear_scaling,
    llama3_scaling,
    yarn_gain,
    yarn_scaling,
)
from looped.nn.masks import Causal
from looped.nn.projection import head_logits, is_plain, table_of
from looped.nn.recurrence import Disturb, RecurrentDepth, init_weights
from looped.nn.rows import PLAIN, Rows
from looped.nn.two_states import TwoStates, answer_of
from looped.tensor_types import Float, Int

State = Float[Tensor, "batch length width"]
Logits = Float[Tensor, "batch length vocab"]
Level = Float[Tensor, "batch"] | Float[Tensor, "batch length"]


@dataclass(frozen=True)
class Structure:
    """Structure of a model that its training rule and its blocks require.

    `cond_width` builds the noise-level conditioning of the core (denoising); None builds the plain loop.
    `effective_depth` scales the initialisation of the output projections; None counts every layer once.
    `core_layers`: number of layers per block of the core; None: one block with all, the weight-tied loop.
    `held`: the blocks in this model; None: all. The others take no memory and cannot run.
    `checkpointed`: layers save only their inputs for backward (`TransformerLayer`). `mask_token`: adds the token
    `vocab_size` to the embedding, the mask token, which is never predicted. `loop_steps`: the trained number of loop
    steps, between which lies the boundary of the config (`boundary_of`); None: none does.
    """

    cond_width: int | None = None
    effective_depth: int | None = None
    core_layers: Sequence[int] | None = None
    held: Collection[int] | None = None
    checkpointed: bool = False
    mask_token: bool = False
    loop_steps: int | None = None


PLAIN_LOOP = Structure()


class LanguageModel(nn.Module):
    """A causal language model of any depth."""

    caches_steps = True
    """Its blocks find the earlier rows of a text in `rows.cache`, which is tested of custom ones."""

    def __init__(self, config: ModelConfig, vocab_size: int, structure: Structure = PLAIN_LOOP):
        super().__init__()
        s = structure
        require(config, ModelConfig, "config", "pass ModelConfig(width=64), or call looped.build(config, vocab_size)")
        whole_number("vocab_size", vocab_size, 1)
        self.config = config
        self.vocab_size = vocab_size
        self.width: int = config.width
        self.num_prelude_layers: int = config.num_prelude_layers
        sizes = tuple(s.core_layers or (config.num_core_layers,))
        self.block_layers: tuple[int, ...] = sizes
        self.core_layers: tuple[int, ...] = tuple(config.layer_runs * size for size in sizes)
        self.num_coda_layers: int = config.num_coda_layers
        self.mask_token: int | None = vocab_size if s.mask_token else None
        self.embed: nn.Embedding = nn.Embedding(vocab_size + s.mask_token, config.width)
        self.embed_scale: float = math.sqrt(config.width) if config.embed_scale is None else config.embed_scale
        self.prelude: nn.ModuleList = nn.ModuleList(
            layer_of(config, number, checkpointed=s.checkpointed) for number in range(config.num_prelude_layers))
        self.recurrence: RecurrentDepth = loop_of(config, s)
        self.level_embedding: LevelEmbedding | None = LevelEmbedding(s.cond_width) if s.cond_width else None
        first = config.num_prelude_layers + sum(sizes)
        self.coda: nn.ModuleList = nn.ModuleList(
            layer_of(config, first + number, checkpointed=s.checkpointed) for number in range(config.num_coda_layers))
        # If each pass ends in a norm and there is no coda, the norm of the last pass is the final one.
        normed = (config.loop_norm == "each-pass" and not config.num_coda_layers
                  and self.recurrence.boundary.keeps_passes)
        self.norm: Plain | RMSNorm = Plain() if normed else RMSNorm(config.width, eps=config.norm_eps)
        self.head: nn.Linear | None = None if config.tie_embeddings else nn.Linear(config.width, vocab_size, bias=False)
        self.exit_gate: ExitGate | None = ExitGate(config.width) if config.exit_gate else None
        self.rotary: Rotary = rotary_of(config)
        layers = config.num_prelude_layers + config.num_core_layers + config.num_coda_layers
        start_weights(self, config.width, s.effective_depth or layers)

    @classmethod
    def of_data(cls, config: Config, vocab_size: int, picture: ImageSpec | None,
                structure: Structure) -> "LanguageModel":
        """The model of a config for `vocab_size` tokens; `picture` is None. Raises UserError if the config's padded
        vocabulary is smaller."""
        padded = config.model.padded_vocab_size
        if padded is not None and padded < vocab_size:
            raise UserError(f"model.padded_vocab_size {padded} has no room for {vocab_size} tokens; use "
                            f"the tokenizer that belongs to the model, or set it to {vocab_size} or more")
        return cls(config.model, padded or vocab_size, structure)

    def start_shared(self, effective_depth: int) -> None:
        """Initialise all but the core in place, with draws that do not depend on the core."""
        start_around(self, effective_depth)

    def placed(self, x: Tensor, rows: Rows) -> Rows:
        """The rows of x as layers get them: with rotary angles, and causal without a mask or context."""
        mask = Causal() if rows.mask is None and rows.context is None else rows.mask
        return rows.having(mask=mask, rotation=rows.rotated(self.rotary, x))

    def encode(self, tokens: Int[Tensor, "batch length"], rows: Rows = PLAIN) -> State:
        """The prelude's output `e`; row i depends on tokens <= i (or on what the mask allows)."""
        x = self.embed_scale * self.embed(tokens)
        return run_layers(self.prelude, x, None, self.placed(x, rows).at("prelude"))

    @property
    def step_layers(self) -> float:
        """Layer forwards of the core per loop step, a mean over its blocks; `core_layers` has those of each."""
        return sum(self.core_layers) / len(self.core_layers)

    def initial_state(self, e: State, noise: State | None = None) -> LoopState:
        """The state before the first loop step; see `RecurrentDepth.initial_state`."""
        return self.recurrence.initial_state(e, noise)

    def step(self, state: LoopState, e: State, level: Level | None = None, rows: Rows = PLAIN) -> LoopState:
        """One loop step, from a state of `initial_state` or of another step. `level` (B,) or (B, L) conditions it on a
        noise level, `rows.step` on its index in the loop if the model has a step embedding."""
        cond = self.level_embedding(level) if level is not None else None
        told = self.placed(state, rows).at("core").having(step=None)  # a compiled core is the same at every step
        return self.recurrence.step(state, e, cond, told, block=rows.block, index=rows.step)

    def decode(self, state: LoopState, rows: Rows = PLAIN) -> Logits:
        """Norm, coda, norm, head."""
        return head_logits(self, self.hidden(state, rows))

    def hidden(self, state: LoopState, rows: Rows = PLAIN) -> State:
        """The head's input: norm (`loop_norm`), coda, norm. With `head_weight` a loss needs no logits of all rows at
        once."""
        state = self.recurrence.leave(state)
        return self.norm(run_layers(self.coda, self._left_loop(state), None, self.placed(state, rows).at("coda")))

    def _left_loop(self, state: LoopState) -> State:
        """The input of the coda: the answer in the state, after the norm if `loop_norm` is `before-coda`."""
        answer = answer_of(state, self.width)
        return self.norm(answer) if self.config.loop_norm == "before-coda" else answer

    @property
    def head_weight(self) -> Float[Tensor, "vocab width"]:
        """Weight of the head, the embedding's if they are tied. Raises `UserError` if the weight of an untied head does
        not determine its logits (LoRA, hooks); `head_logits` takes any head."""
        if self.head is None:
            return table_of(self.embed, self.vocab_size)
        if not is_plain(self.head):
            raise UserError(f"the head is a {type(self.head).__name__} or has hooks, so its weight alone does not "
                            f"give its logits; use looped.nn.projection.head_logits(model, hidden)")
        return self.head.weight

    def unroll(self, e: State, rows: Rows = PLAIN, *, no_grad: int | Tensor = 0, grad: int | Tensor,
               state: LoopState | None = None, noise: State | None = None,
               callback: Callable[[int, LoopState], Any] | None = None, disturb: Disturb | None = None,
               first: int = 0, damping: float = 0.0) -> LoopState:
        """Run the loop; arguments as in `RecurrentDepth.unroll`. With a cache, each step has its own part of it. Raises
        `UserError` for a cache or context with one depth per sequence."""
        if e.ndim != 3 or e.shape[-1] != self.width:
            raise UserError(f"e must be what encode(tokens) returns, (batch, length, {self.width}), got {kind_of(e)}")
        whole = self.placed(e, rows)

        def of_step(index: int, sequences: Tensor | None) -> Rows:
            if sequences is None:
                return whole.at("core", index)
            if whole.cache is not None or whole.context is not None:
                raise UserError("a cache or context holds all sequences of a batch, and a loop with one depth per "
                                "sequence runs some of them; pass one depth for all, or rows without cache and context")
            return whole.of(sequences)

        return self.recurrence.unroll(e, no_grad=no_grad, grad=grad, state=state, noise=noise, callback=callback,
                                      rows=of_step, disturb=disturb, first=first, damping=damping)

    def forward(self, tokens: Int[Tensor, "batch length"], num_steps: int, *, noise: State | None = None) -> Logits:
        """Logits after `num_steps` loop steps. Raises `UserError` for ids outside the vocabulary."""
        tokens = ids_of(tokens, self.vocab_size + (self.mask_token is not None))
        whole_number("num_steps", num_steps)
        return self.decode(self.unroll(self.encode(tokens), grad=num_steps, noise=noise))

    def make_context(self, e: State, kind: str, rows: Rows = PLAIN) -> Cache | None:
        """Clean keys and values that noisy rows attend to in every core and coda layer, the same at all noise levels.

        - `inject`: None, no context.
        - `context`: every layer takes them from the prelude's output.
        - `concat`: the clean rows run once through core and coda, unconditioned.

        If `rows.context`, an earlier return value, is given, the new keys and values are appended to it; `rows.mask` is
        the attention pattern among the clean rows. A core of several blocks has a separate context for each
        (`Cache.of_block`), or only for `rows.block` if given.
        """
        if kind == "inject":
            return None
        if kind not in ("context", "concat"):
            raise UserError(f"unknown context '{kind}'{did_you_mean(kind, ('inject', 'context', 'concat'))}")
        context = rows.context if rows.context is not None else Cache()
        placed, blocks = self.placed(e, rows.having(context=None, cache=None)), self.recurrence.core.blocks
        for number in range(len(blocks)) if rows.block is None else [rows.block]:
            own = context.of_block(number if len(blocks) > 1 else None)
            self._record(blocks[number], e, kind, own, placed)
        return context

    def _record(self, block: nn.Module, e: State, kind: str, context: Cache, rows: Rows) -> None:
        """Record the context of one block."""
        if kind == "context":
            for name, layers in (("core", block.layers), ("coda", self.coda)):
                for i, layer in enumerate(layers):
                    layer.record(e, context.child(name).layer(i), rotation=rows.rotation)
            return
        x = block.norm(run_layers(block.layers, e, None, rows.having(cache=context.child("core"))))
        self._record_last(x, context.child("coda"), rows)

    def _record_last(self, x: State, context: Cache, rows: Rows) -> None:
        """Run the clean rows through the coda. The last layer's output is unused, so only its keys and values are
        computed."""
        if not len(self.coda):
            return
        x = run_layers(self.coda[:-1], self._left_loop(x), None, rows.having(cache=context))
        last = len(self.coda) - 1
        self.coda[last].record(x, context.layer(last), rotation=rows.rotation)

    def compile_step(self, **settings: Any) -> None:
        """Compile one loop step; `settings` go to `torch.compile`, as `backend="eager"`."""
        self.recurrence.compile_step(**settings)


def layer_of(config: ModelConfig, number: int = 0, *, checkpointed: bool, **own: Any) -> TransformerLayer:
    """A layer of a model; `number`: its index among all layers, from 0; own: further arguments of the layer."""
    c = config
    rotary = c.nope_interval is None or (number + 1) % c.nope_interval != 0
    return TransformerLayer(c.width, c.num_heads, c.hidden, block=c.block, eps=c.norm_eps, checkpointed=checkpointed,
                            activation=c.ffn, num_kv_heads=c.kv_heads, head_dim=c.head_width, bias=c.attention_bias,
                            qk_norm=c.qk_norm, rotary=rotary, backend=c.attention, **own)


def rotary_of(config: ModelConfig) -> Rotary:
    """Rotary positions of a model's layers, with frequency scaling if it is set."""
    s = config.rope_scaling
    if s is None:
        return Rotary(config.head_width, base=config.rope_base)
    ways = {"linear": partial(linear_scaling, factor=s.factor),
            "llama3": partial(llama3_scaling, factor=s.factor, low=s.low_freq_factor, high=s.high_freq_factor,
                              original_length=s.original_length),
            "yarn": partial(yarn_scaling, factor=s.factor, betas=(s.beta_fast, s.beta_slow), base=config.rope_base,
                            original_length=s.original_length, truncate=s.truncate)}
    gains = {"yarn": yarn_gain(s.factor) if s.attention_factor is None else s.attention_factor}
    return Rotary(config.head_width, base=config.rope_base, scaling=ways[s.kind], gain=gains.get(s.kind, 1.0))


def _made(core: Any, name: str, sizes: tuple[int, int, int | None]) -> nn.Module:
    """A custom core. Raises UserError where it cannot be constructed as documented."""
    try:
        return core(*sizes)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise UserError(f"model.core {name} cannot be constructed ({error}); its arguments are (width, num_layers, "
                        f"cond_width), the last None where the rule conditions on no level") from error


def loop_of(config: ModelConfig, structure: Structure) -> RecurrentDepth:
    """The loop over a core of blocks; those not `held` are placeholders (`MissingBlock`)."""
    held, steps = structure.held, structure.loop_steps
    modulated = steps is not None and config.step_embedding == "modulate"
    cond_width = NUM_FEATURES if modulated else structure.cond_width
    branch_scale = 1 / steps if steps is not None and config.loop_scale == "branches" else 1.0

    def whole(net: nn.Module) -> nn.Module:
        return TwoStates(net, updates=config.latent_updates) if config.latent_updates else net

    def block_of(first: int, num_layers: int) -> nn.Module:
        if config.core is not None:
            own = _made(class_at(config.core, "model.core"), config.core, (config.width, num_layers, cond_width))
            return whole(OwnBlock(own, config.width, cond_width))
        layers = [layer_of(config, first + number, checkpointed=structure.checkpointed, branch_scale=branch_scale,
                           **{"modulation": StepModulation(config.width)} if modulated else {"cond_width": cond_width})
                  for number in range(num_layers)]
        norm = RMSNorm(config.width, eps=config.norm_eps) if config.loop_norm == "each-pass" else None
        return whole(LayerStack(build_injection(config.injection, config.width), layers, norm))

    sizes = structure.core_layers or (config.num_core_layers,)
    firsts = itertools.accumulate(sizes, initial=config.num_prelude_layers)
    core = [block_of(first, num_layers) if held is None or number in held else MissingBlock(number)
            for number, (first, num_layers) in enumerate(zip(firsts, sizes, strict=False))]
    return RecurrentDepth(Core(*core, runs=config.core_runs), state_init=config.state_init, state_std=config.state_std,
                          width=config.width, boundary=boundary_of(config, steps))


def boundary_of(config: ModelConfig, loop_steps: int | None) -> Boundary:
    """The boundary between the steps of a loop trained for `loop_steps` steps; None: a core that is not looped."""
    if loop_steps is None:
        return Boundary()
    width = config.width * (2 if config.latent_updates else 1)
    parts = STEP_EMBEDDINGS[config.step_embedding](width)
    if config.loop_scale == "update":
        parts.append(ScaledUpdate(loop_steps))
    if config.streams > 1:
        parts.append(Streams(width, config.streams, dynamic=config.stream_mixing == "dynamic"))
    return Boundary(*parts)


def start_around(model: nn.Module, effective_depth: int) -> None:
    """Initialise all but the core of a model in place, with draws that do not depend on the core."""
    for child in model.children():
        if child is not model.recurrence:
            start_weights(child, model.width, effective_depth)


def start_weights(module: nn.Module, width: int, effective_depth: int) -> None:
    """Initialise a model, or a block of its core, in place: `init_weights`, then the injection `diagonal`."""
    init_weights(module, width, effective_depth)
    for child in module.modules():
        if isinstance(child, Diagonal):
            child.reset_mix()
