"""The loop: `Core` holds N blocks (one is the tied loop), `RecurrentDepth` applies it again and again.

Any `nn.Module` with `(state, e, cond) -> state` can be a block, so the loop can be taken without the rest:

    loop = RecurrentDepth(Core(MyBlock()), state_init="zero")
    state = loop(e, num_steps=8)
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from looped.errors import UserError, did_you_mean
from looped.nn.cache import Cache
from looped.nn.layers import RMSNorm, TransformerLayer

State = Float[Tensor, "batch length width"]


class Core(nn.Module):
    """N blocks, of which one is applied a step: step `index` takes block `index % N` unless `block` names it."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        if not blocks:
            raise UserError("a Core needs at least one block; pass one for a tied loop or N for an untied stack")
        self.blocks = nn.ModuleList(blocks)

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def forward(self, state: Tensor, e: Tensor, cond: Tensor | None = None, *, index: int = 0,
                block: int | None = None, **options: Any) -> Tensor:
        return self.blocks[index % self.num_blocks if block is None else block](state, e, cond, **options)


class Absent(nn.Module):
    """The place of a block that another machine holds: no weights, and a UserError for whoever asks it for anything."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    @property
    def layers(self) -> NoReturn:
        self.refuse()

    def forward(self, state: Tensor, e: Tensor, cond: Tensor | None = None, **options: Any) -> NoReturn:
        self.refuse()

    def refuse(self) -> NoReturn:
        raise UserError(f"block {self.number} of the core is not here (blocks.alone); put the runs of all blocks "
                        f"together with looped merge")


class LayerStack(nn.Module):
    """The usual block: an injection, then Transformer layers."""

    def __init__(self, injection: nn.Module, layers: Iterable[TransformerLayer]):
        super().__init__()
        self.injection = injection
        self.layers = nn.ModuleList(layers)

    def forward(self, state: State, e: State, cond: Tensor | None = None, *, cache: Cache | None = None,
                context: Cache | None = None, **options: Any) -> State:
        return run_layers(self.layers, self.injection(state, e), cond, cache=cache, context=context, **options)


def run_layers(layers: Iterable[TransformerLayer], x: State, cond: Tensor | None = None, *, cache: Cache | None = None,
               context: Cache | None = None, **options: Any) -> State:
    """Apply layers in turn, each with its own place in the caches."""
    for i, layer in enumerate(layers):
        x = layer(x, cond, cache=cache.layer(i) if cache is not None else None,
                  context=context.layer(i) if context is not None else None, **options)
    return x


class RecurrentDepth(nn.Module):
    """A loop of any depth over a core: where it starts, one step, and how far gradients reach back."""

    def __init__(self, core: nn.Module, *, state_init: str = "zero"):
        super().__init__()
        if state_init not in STATE_INITS:
            raise UserError(f"state_init '{state_init}' is unknown{did_you_mean(state_init, STATE_INITS)}")
        self.core = core
        self.state_init = state_init

    @property
    def num_blocks(self) -> int:
        """Blocks of the core, which steps take in turn; a core that says nothing is one."""
        return getattr(self.core, "num_blocks", 1)

    def block_at(self, index: int) -> int | None:
        """The block that step `index` takes; None where there is one."""
        return index % self.num_blocks if self.num_blocks > 1 else None

    @property
    def needs_noise(self) -> bool:
        """Whether the initial state is drawn at random."""
        return self.state_init in ("like-init", "noise")

    def initial_state(self, e: State, noise: State | None = None) -> State:
        """The state before the first step; `like-init` and `noise` take standard normal draws of e's shape."""
        return STATE_INITS[self.state_init](e, noise)

    def step(self, state: State, e: State, cond: Tensor | None = None, **options: Any) -> State:
        """One application of the core."""
        return self.core(state, e, cond, **options)

    def forward(self, e: State, num_steps: int, **options: Any) -> State:
        """`num_steps` steps, all with gradient."""
        return self.unroll(e, no_grad=0, grad=num_steps, **options)

    def unroll(self, e: State, *, no_grad: int | Tensor, grad: int | Tensor, state: State | None = None,
               noise: State | None = None, cond: Tensor | None = None,
               callback: Callable[[int, State], Any] | None = None,
               options: Callable[[int, Tensor | None], dict] | None = None) -> State:
        """`no_grad` steps without gradient, then `grad` steps with it (Huginn's truncated BPTT).

        Tensors (B,) give each sequence its own depths: a finished sequence is left out of the batch, so nothing is
        computed for it. `options(index, rows)` gives the keyword arguments of a step for the sequences of these
        numbers (None: all, in their order). `callback(index, state)` sees the state after each step; True from it stops
        the loop.
        """
        state = self.initial_state(e, noise) if state is None else state
        if isinstance(no_grad, Tensor) or isinstance(grad, Tensor):
            return self._unroll_rows(e, no_grad, grad, state, cond, options)
        for index in range(no_grad + grad):
            with torch.set_grad_enabled(index >= no_grad and torch.is_grad_enabled()):
                state = self.step(state, e, cond, **self._step_options(index, options))
            if callback is not None and callback(index, state):
                break
        return state

    def _unroll_rows(self, e, no_grad, grad, state, cond, options) -> State:
        if self.num_blocks > 1:
            raise UserError("depth by sequence needs a tied core (one block); set recurrence.per_sequence to false")
        no_grad, grad = (torch.as_tensor(n, device=e.device).expand(e.shape[0]) for n in (no_grad, grad))
        # n and k = min(p, k_max) both grow with the depth p: in this order the rows still running are a prefix.
        order = torch.argsort(no_grad + grad, descending=True, stable=True)
        e, state, cond = e[order], state[order], None if cond is None else cond[order]
        with torch.no_grad():
            state = self._run_rows(state, e, cond, no_grad, order, options)
        state = self._run_rows(state, e, cond, grad, order, options)
        return state[torch.argsort(order)]

    def _run_rows(self, state, e, cond, depth, order, options) -> State:
        depth = depth[order].tolist()
        assert depth == sorted(depth, reverse=True), "rows must be sorted by falling depth"
        for index in range(depth[0]):
            rows = sum(d > index for d in depth)
            new = self.step(state[:rows], e[:rows], None if cond is None else cond[:rows],
                            **self._step_options(index, options, order[:rows]))
            state = torch.cat([new, state[rows:]]) if rows < len(depth) else new
        return state

    def _step_options(self, index: int, options: Callable[[int, Tensor | None], dict] | None,
                      rows: Tensor | None = None) -> dict:
        block = self.block_at(index)
        chosen = {} if block is None else {"block": block}  # not the index: a compiled step then has a graph a block
        return chosen | (options(index, rows) if options is not None else {})

    def compile_step(self, **settings: Any) -> None:
        """`torch.compile` one step, never the loop: the graph does not depend on the number of steps."""
        self.step = torch.compile(self.step, **settings)


def _normal(e: State, noise: State | None) -> State:
    if noise is None:
        raise UserError("this state_init needs standard normal draws of the state's shape; pass noise=, or choose zero")
    return noise.to(e.dtype)


def _like_init(e: State, noise: State | None) -> State:
    """Huginn's: normal of std sqrt(2 / (5 D)) * sqrt(D), cut at three standard deviations."""
    uniform = torch.special.ndtr(_normal(e, noise).double())
    low = torch.special.ndtr(torch.tensor(-3.0, dtype=torch.float64))
    return (torch.special.ndtri(low + (1 - 2 * low) * uniform) * math.sqrt(2 / 5)).to(e.dtype)


STATE_INITS: dict[str, Callable[[State, State | None], State]] = {
    "like-init": _like_init,
    "noise": _normal,
    "zero": lambda e, noise: torch.zeros_like(e),
    "embedding": lambda e, noise: e,
}
"""Name -> (e, standard normal draws or None) -> state."""


def init_weights(module: nn.Module, width: int, effective_depth: int) -> None:
    """Huginn's initialisation (Takase et al. 2024) in place: std sqrt(2 / (5 D)), cut at three standard deviations;
    output projections divided by sqrt(2 * effective_depth), where the core counts once a loop step."""
    std = math.sqrt(2 / (5 * width))
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear) and not name.endswith("modulation.linear"):
            scale = math.sqrt(2 * effective_depth) if name.endswith(".out") else 1.0
            _truncated_normal(child.weight, std / scale)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            _truncated_normal(child.weight, std)
        elif isinstance(child, RMSNorm):
            nn.init.ones_(child.weight)


def _truncated_normal(weight: Tensor, std: float) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
