"""Blocks of the core: the contract of a block, N of them as a `Core`, the usual stack of layers, and custom modules.

A block is called as `(state, e, cond)` in a plain loop, and as `(state, e, cond, rows)` in a model of this package.
`rows` (`looped.nn.rows.Rows`) has the attention pattern (`mask`), the rotary angles (`rotation`) and, in sampling, the
keys and values of other rows (`cache`, `context`). A block that treats each row separately ignores them; a block that
mixes rows must apply the mask.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from looped.errors import UserError
from looped.nn.checks import require, whole_number
from looped.nn.layers import TransformerLayer
from looped.nn.rows import Rows
from looped.rng import generator
from looped.tensor_types import Float

State = Float[Tensor, "batch length width"]
LoopState = Float[Tensor, "batch length ..."]
"""A state of the loop: (B, L, D), or (B, L, S D) with the S states of a core side by side (`Core.num_states`); with m
parallel streams (boundary.py) (B, L, m, S D)."""


class Block(Protocol):
    """The contract of a block of the core: `(state, e, cond) -> state`, and `rows` if a model calls it.

    state: (B, L, D), or a tuple of tensors (B, ...) passed to the loop as `state=`; the next state has the same shape.
    e: the encoded input (B, L, D). cond: the embedding of the noise level, (B, C) or (B, L, C), None in a plain loop.
    rows: the value of the caller's `rows=` for the step; in a model of this package a `looped.nn.rows.Rows` with the
    attention mask, positions and cache.
    """

    def __call__(self, state: Any, e: Tensor, cond: Tensor | None, *rows: Any) -> Any: ...


def require_block(block: Any) -> None:
    """Raise `UserError` unless `block` is a module that can be called as a `Block`, with `rows` or without."""
    require(block, nn.Module, "a block of the loop", "wrap a function in an nn.Module")
    if not any(_takes(block.forward, num) for num in (3, 4)):
        name = f"{type(block).__name__}.forward{inspect.signature(block.forward)}"
        raise UserError(f"{name} cannot be called as (state, e, cond) or (state, e, cond, rows), as the loop calls a "
                        f"block; wrap it in a module whose forward takes these and returns the next state")


class Core(nn.Module):
    """N blocks, one of which is applied per step: step `index` runs block `index % N` unless `block` is given.

    runs: how often a step applies its block, each time to the state before and the same e and cond: a loop within the
    step. Each run has its own part of a cache, so with several a caller's `rows` need `in_run` (`looped.nn.rows.Rows`).
    Blocks that no step runs get no gradient: for training with fewer steps than blocks, wrap the model in
    `DistributedDataParallel(..., find_unused_parameters=True)`. Raises `UserError` without blocks, for a module that
    cannot be called as a `Block`, and for fewer than one run.
    """

    def __init__(self, *blocks: nn.Module, runs: int = 1):
        super().__init__()
        self.runs: int = whole_number("runs", runs, 1)
        if not blocks:
            raise UserError("a Core needs at least one block; pass one for a tied loop or N for an untied stack")
        for block in blocks:
            require_block(block)
        self.blocks: nn.ModuleList = nn.ModuleList(blocks)

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def num_states(self) -> int:
        """States that a block's state consists of, by its `num_states`; 1 without it."""
        return max(getattr(block, "num_states", 1) for block in self.blocks)

    def forward(self, state: Tensor, e: Tensor, cond: Tensor | None = None, *rows: Any, index: int = 0,
                block: int | None = None) -> Tensor:
        chosen = self.blocks[index % self.num_blocks if block is None else block]
        for run in range(self.runs):
            state = chosen(state, e, cond, *(rows if self.runs == 1 else [each.in_run(run) for each in rows]))
        return state


class MissingBlock(nn.Module):
    """Placeholder for a block that another machine holds: it has no weights and raises UserError on use."""

    keeps_mask = True
    """Nothing runs that could break it."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    @property
    def layers(self) -> NoReturn:
        self.refuse()

    def forward(self, state: Tensor, e: Tensor, cond: Tensor | None = None, *rows: Rows) -> NoReturn:
        self.refuse()

    def refuse(self) -> NoReturn:
        raise UserError(f"block {self.number} of the core is not here (blocks.alone); combine the runs of all "
                        f"blocks with looped merge")


class LayerStack(nn.Module):
    """The usual block: an injection, then Transformer layers, then a norm if there is one."""

    keeps_mask = True
    """The package's own layers keep to the attention mask, which a custom block is tested for."""

    def __init__(self, injection: nn.Module, layers: Iterable[TransformerLayer], norm: nn.Module | None = None):
        super().__init__()
        self.injection = injection
        self.layers: nn.ModuleList = nn.ModuleList(layers)
        self.norm: nn.Module = nn.Identity() if norm is None else norm

    def forward(self, state: State, e: State, cond: Tensor | None, rows: Rows) -> State:
        return self.norm(run_layers(self.layers, self.injection(state, e), cond, rows))


class OwnBlock(nn.Module):
    """A custom block in a model: called as `(state, e, cond)`, with `rows` as well if its forward takes them.

    It keeps its own initialisation. Without `rows` it does not know the attention pattern, so it must treat each row
    separately: raises UserError if a later row changes the output of an earlier one. With `rows` it is tested with the
    masks of the run (looped/objectives/leaks.py).
    """

    def __init__(self, block: nn.Module, width: int, cond_width: int | None):
        super().__init__()
        self.block = block
        self.takes_rows: bool = _takes(block.forward, 4)
        if not self.takes_rows:
            self.check(width, cond_width)

    def forward(self, state: State, e: State, cond: Tensor | None, rows: Rows) -> State:
        return self.block(state, e, cond, *((rows,) if self.takes_rows else ()))

    @torch.no_grad()
    def check(self, width: int, cond_width: int | None) -> None:
        """Raise UserError if the block changes the state's shape, or if a later row changes an earlier one."""
        training, probe = self.block.training, torch.randn(2, 1, 4, width, generator=generator("own block"))
        cond = torch.zeros(1, cond_width) if cond_width else None
        self.block.eval()
        whole, first = (self.block(*probe[:, :, :length], cond) for length in (4, 1))
        self.block.train(training)
        if whole.shape != probe[0].shape:
            raise UserError(f"a core must keep the state's shape: {type(self.block).__name__} was given "
                            f"{tuple(probe[0].shape)} but returned {tuple(whole.shape)}; return the shape of the state")
        if not unchanged(whole[:, :1], first).all():
            raise UserError(f"{type(self.block).__name__} lets later rows change earlier ones without taking the "
                            f"attention mask; give its forward a fourth argument, rows (looped.nn.rows.Rows), and "
                            f"apply rows.mask")

    @property
    def layers(self) -> NoReturn:
        raise UserError("a custom core has no layers to provide keys and values of clean rows; set denoise.context to "
                        "inject")


def unchanged(before: Tensor, after: Tensor) -> Tensor:
    """Mask of the numbers that are the same up to rounding."""
    return torch.isclose(before, after, atol=1e-4, rtol=1e-3, equal_nan=True)


def _takes(function: Callable[..., Any], num: int) -> bool:
    """True if a function can be called with `num` positional arguments and nothing else, as far as can be known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function not written in Python
        return True
    try:
        signature.bind(*range(num))
    except TypeError:
        return False
    return True


def run_layers(layers: Iterable[TransformerLayer], x: State, cond: Tensor | None, rows: Rows) -> State:
    """Apply layers in order, each with its own part of cache and context."""
    for i, layer in enumerate(layers):
        x = layer(x, cond, rows.layer(i))
    return x
