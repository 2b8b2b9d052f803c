"""The looped language model: prelude, weight-tied core, coda, as `encode`, `step`, `decode`.

Huginn's structure (Geiping et al. 2025, arXiv 2502.05171): `e = prelude(sqrt(D) embed(ids))`, the core applied any
number of times with `e` injected, one final norm used after the loop and again after the coda, a tied head.
"""

import math
from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from looped.config.model import ModelConfig
from looped.errors import UserError, did_you_mean
from looped.nn.bias import Causal, Mask
from looped.nn.cache import Cache
from looped.nn.checks import ids_of, kind_of, require, whole_number
from looped.nn.conditioning import LevelEmbedding
from looped.nn.injection import Diagonal, build_injection
from looped.nn.layers import RMSNorm, Rotary, TransformerLayer
from looped.nn.projection import head_logits, is_plain, table_of
from looped.nn.recurrence import Absent, Core, LayerStack, RecurrentDepth, init_weights, run_layers

State = Float[Tensor, "batch length width"]
Logits = Float[Tensor, "batch length vocab"]
Level = Float[Tensor, "batch"] | Float[Tensor, "batch length"]
Positions = Int[Tensor, "batch length axes"]
Start = int | Int[Tensor, "batch"]
"""The position of the first row, for all sequences or each its own (padding on the left)."""


class LanguageModel(nn.Module):
    """A causal language model of any depth.

    `cond_width` builds the noise-level conditioning of the core (denoising); None builds the plain loop.
    `effective_depth` scales the initialisation of the output projections; None counts every layer once.
    `core_layers`: the layers of each block of the core; None has them all in one, the weight-tied loop.
    `held`: the blocks that there are; None: all. The others take no memory and cannot be asked.
    `checkpointed`: layers keep their inputs alone for backward (`TransformerLayer`). `mask_token`: one more row of the
    embedding, number `vocab_size`, which stands for a hidden token and is never predicted.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, *, cond_width: int | None = None,
                 effective_depth: int | None = None, core_layers: Sequence[int] | None = None,
                 held: Collection[int] | None = None, checkpointed: bool = False, mask_token: bool = False):
        super().__init__()
        require(config, ModelConfig, "config", "pass ModelConfig(width=64), or call looped.build(config, vocab_size)")
        whole_number("vocab_size", vocab_size, 1)
        self.config, self.vocab_size, self.width = config, vocab_size, config.width
        self.core_layers = tuple(core_layers or (config.num_core_layers,))
        self.mask_token = vocab_size if mask_token else None
        self.embed = nn.Embedding(vocab_size + mask_token, config.width)
        self.prelude = nn.ModuleList(layer_of(config, checkpointed=checkpointed)
                                     for _ in range(config.num_prelude_layers))
        self.recurrence = loop_of(config, self.core_layers, cond_width, held=held, checkpointed=checkpointed)
        self.level_embedding = LevelEmbedding(cond_width) if cond_width else None
        self.coda = nn.ModuleList(layer_of(config, checkpointed=checkpointed)
                                  for _ in range(config.num_coda_layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, vocab_size, bias=False)
        self.rotary = Rotary(config.width // config.num_heads, base=config.rope_base)
        layers = config.num_prelude_layers + config.num_core_layers + config.num_coda_layers
        start_weights(self, config.width, effective_depth or layers)

    def start_shared(self, effective_depth: int) -> None:
        """Initialise all but the core in place, with draws that do not depend on the core."""
        start_around(self, effective_depth)

    def _rows(self, x: Tensor, start: Start, mask: Mask | None, context: Cache | None = None,
              positions: Positions | None = None) -> dict:
        """The keyword arguments every layer needs for rows at `positions`, or at start, start + 1, ..."""
        if positions is None:
            positions = torch.as_tensor(start, device=x.device).unsqueeze(-1) + torch.arange(x.shape[1],
                                                                                             device=x.device)
        return {"mask": mask if mask or context is not None else Causal(), "rotation": self.rotary(positions)}

    def encode(self, tokens: Int[Tensor, "batch length"], *, mask: Mask | None = None, cache: Cache | None = None,
               start: Start = 0, positions: Positions | None = None) -> State:
        """The prelude's output `e`; row i sees tokens <= i (or what `mask` allows). `start`: first row's position;
        `positions`, here and below: where all rows stand instead, with an axis or several (cells of a grid)."""
        x = math.sqrt(self.config.width) * self.embed(tokens)
        return run_layers(self.prelude, x, cache=cache and cache.child("prelude"),
                          **self._rows(x, start, mask, positions=positions))

    @property
    def step_layers(self) -> float:
        """Layers of the core that a loop step runs: a mean over its blocks."""
        return sum(self.core_layers) / len(self.core_layers)

    def initial_state(self, e: State, noise: State | None = None) -> State:
        """The state before the first loop step; see `RecurrentDepth.initial_state`."""
        return self.recurrence.initial_state(e, noise)

    def step(self, state: State, e: State, level: Level | None = None, *, mask: Mask | None = None,
             cache: Cache | None = None, context: Cache | None = None, start: Start = 0, strict: bool = False,
             positions: Positions | None = None, block: int | None = None) -> State:
        """One loop step. `level` (B,) or (B, L) conditions it on a noise level; `context` holds clean keys and values
        (see `make_context`), which row i sees up to i beside itself or as `mask` says of context and rows together;
        `cache` holds those of earlier rows at the same step. `block`: which block of the core; None: the first."""
        cond = self.level_embedding(level) if level is not None else None
        return self.recurrence.step(state, e, cond, cache=cache, context=context and context.child("core"),
                                    strict=strict, **({} if block is None else {"block": block}),
                                    **self._rows(state, start, mask, context, positions))

    def decode(self, state: State, *, mask: Mask | None = None, cache: Cache | None = None,
               context: Cache | None = None, start: Start = 0, strict: bool = False,
               positions: Positions | None = None) -> Logits:
        """Norm, coda, norm, head."""
        x = self.hidden(state, mask=mask, cache=cache, context=context, start=start, strict=strict,
                        positions=positions)
        return head_logits(self, x)

    def hidden(self, state: State, *, mask: Mask | None = None, cache: Cache | None = None,
               context: Cache | None = None, start: Start = 0, strict: bool = False,
               positions: Positions | None = None) -> State:
        """What the head reads: norm, coda, norm. A loss over `head_weight` needs no logits of all rows at once."""
        x = run_layers(self.coda, self.norm(state), cache=cache, context=context and context.child("coda"),
                       strict=strict, **self._rows(state, start, mask, context, positions))
        return self.norm(x)

    @property
    def head_weight(self) -> Float[Tensor, "vocab width"]:
        """The rows that `decode` compares `hidden` with. Raises `UserError` where a head of its own is more than its
        weight; `head_logits` reads any."""
        if self.head is None:
            return table_of(self.embed, self.vocab_size)
        if not is_plain(self.head):
            raise UserError(f"the head is a {type(self.head).__name__} or has hooks, so its weight alone is not what "
                            f"it says; read it with looped.nn.projection.head_logits(model, hidden)")
        return self.head.weight

    def unroll(self, e: State, *, no_grad: int | Tensor = 0, grad: int | Tensor, mask: Mask | None = None,
               cache: Cache | None = None, start: Start = 0, positions: Positions | None = None, **kwargs) -> State:
        """Loop from the initial state; arguments as `RecurrentDepth.unroll`. With a cache, step t has its own rows."""
        if e.ndim != 3 or e.shape[-1] != self.width:
            raise UserError(f"e must be what encode(tokens) returns, (batch, length, {self.width}), got {kind_of(e)}")
        whole = self._rows(e, start, mask, positions=positions)

        def options(index: int, rows: Tensor | None) -> dict:
            own = whole
            if rows is not None:
                own = own | {"mask": whole["mask"].of_rows(rows)}
            if rows is not None and len(whole["rotation"][0]) > 1:
                own = own | {"rotation": tuple(part[rows] for part in whole["rotation"])}
            return own if cache is None else {"cache": cache.child("core", index), **own}

        return self.recurrence.unroll(e, no_grad=no_grad, grad=grad, options=options, **kwargs)

    def forward(self, tokens: Int[Tensor, "batch length"], num_steps: int, *, noise: State | None = None) -> Logits:
        """Logits after `num_steps` loop steps. Raises `UserError` for what are no token ids of the vocabulary."""
        tokens = ids_of(tokens, self.vocab_size + (self.mask_token is not None))
        whole_number("num_steps", num_steps)
        return self.decode(self.unroll(self.encode(tokens), grad=num_steps, noise=noise))

    def make_context(self, e: State, kind: str, *, mask: Mask | None = None, cache: Cache | None = None,
                     start: Start = 0, positions: Positions | None = None, block: int | None = None) -> Cache | None:
        """The clean keys and values that noisy rows attend to in every core and coda layer, whatever the noise level.

        inject: none (None). context: every layer reads the prelude's output. concat: the clean rows run through the
        core once and the coda, unconditioned. With `cache` (an earlier return value) new rows are appended to it.
        `mask`: who sees whom among the clean rows, causal where None. A core of several blocks has a context for each
        (`Cache.of_block`), as if the others were not there, or for `block` alone.
        """
        if kind == "inject":
            return None
        if kind not in ("context", "concat"):
            raise UserError(f"no context '{kind}'{did_you_mean(kind, ('inject', 'context', 'concat'))}")
        context = cache if cache is not None else Cache()
        rows, blocks = self._rows(e, start, mask, positions=positions), self.recurrence.core.blocks
        for number in range(len(blocks)) if block is None else [block]:
            self._record(blocks[number].layers, e, kind, context.of_block(number if len(blocks) > 1 else None), rows)
        return context

    def _record(self, core: nn.ModuleList, e: State, kind: str, context: Cache, rows: dict) -> None:
        """The context of one block."""
        if kind == "context":
            for name, layers in (("core", core), ("coda", self.coda)):
                for i, layer in enumerate(layers):
                    layer.record(e, context.child(name).layer(i), rotation=rows["rotation"])
            return
        x = run_layers(core, e, cache=context.child("core"), **rows)
        self._record_last(x, context, rows)

    def _record_last(self, x: State, context: Cache, rows: dict) -> None:
        """The clean rows' way through the coda; nobody reads the last layer's output, so only its keys are made."""
        if not len(self.coda):
            return
        x = run_layers(self.coda[:-1], self.norm(x), cache=context.child("coda"), **rows)
        last = len(self.coda) - 1
        self.coda[last].record(x, context.child("coda").layer(last), rotation=rows["rotation"])

    def compile_step(self) -> None:
        """Compile one loop step."""
        self.recurrence.compile_step()


def layer_of(config: ModelConfig, cond_width: int | None = None, *, checkpointed: bool) -> TransformerLayer:
    """A layer of a model."""
    c = config
    return TransformerLayer(c.width, c.num_heads, c.hidden, num_kv_heads=c.kv_heads, block=c.block, qk_norm=c.qk_norm,
                            cond_width=cond_width, eps=c.norm_eps, backend=c.attention, checkpointed=checkpointed,
                            activation=c.ffn)


def loop_of(config: ModelConfig, core_layers: Sequence[int], cond_width: int | None, *, held: Collection[int] | None,
            checkpointed: bool) -> RecurrentDepth:
    """The loop over a core of blocks of so many layers, of which those `held` are there."""
    def block_of(num_layers: int) -> LayerStack:
        layers = [layer_of(config, cond_width, checkpointed=checkpointed) for _ in range(num_layers)]
        return LayerStack(build_injection(config.injection, config.width), layers)

    core = [block_of(num_layers) if held is None or number in held else Absent(number)
            for number, num_layers in enumerate(core_layers)]
    return RecurrentDepth(Core(*core), state_init=config.state_init)


def start_around(model: nn.Module, effective_depth: int) -> None:
    """Initialise all but the core of a model in place, with draws that do not depend on the core."""
    for child in model.children():
        if child is not model.recurrence:
            start_weights(child, model.width, effective_depth)


def start_weights(module: nn.Module, width: int, effective_depth: int) -> None:
    """Initialise a model, or a block of its core, in place: `init_weights`, and the injections that start otherwise."""
    init_weights(module, width, effective_depth)
    for child in module.modules():
        if isinstance(child, Diagonal):
            child.reset_mix()
