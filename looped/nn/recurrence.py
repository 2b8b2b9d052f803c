"""The loop: `RecurrentDepth` applies a core repeatedly, from an initial state, with truncated gradients.

Any `nn.Module` with `(state, e, cond) -> state` can be a block, so the loop can be used alone:

    loop = RecurrentDepth(Core(MyBlock()), state_init="zero")
    state = loop(e, num_steps=8)

In a model of this package, `model.recurrence.core = Core(MyBlock())`, a block is also given `rows`, with the attention
mask and positions (blocks.py).
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from looped.devices import to_device, widest
from looped.errors import UserError, did_you_mean
from looped.nn.blocks import LoopState, OwnBlock, State, require_block
from looped.nn.boundary import Boundary, Index
from looped.nn.checks import counts_by_row, one_for_all, whole_number
from looped.nn.layers import RMSNorm
from looped.tensor_types import Float

States = LoopState | tuple[Tensor, ...]
Parts = Tensor | tuple[Tensor, ...]
"""A state, or some sequences of it."""
Disturb = Callable[[States, int | Sequence[int], Sequence[int] | None], States]
"""(state, step, sequences) -> the state that the core is given: of all sequences (None) before a step of this index, or
of those with these indices before a step of the index that each has in its own loop (`StateNoise`)."""
RowsOfStep = Callable[[int, Tensor | None], Any]
"""(index of a step, indices of its sequences or None for all) -> the step's `rows` argument: `Rows` in a model of this
package, anything the blocks take in a custom loop."""


class RecurrentDepth(nn.Module):
    """A loop of any depth over a core: initial state, one step, and the unroll with truncated gradients.

    state_init: the state before the first step: "zero", "embedding" (e itself), drawn from `noise=`, "noise" (standard
    normal) or "like-init" (normal with a standard deviation of sqrt(2 / 5), truncated at three of them), or "vector",
    one vector of `width` in all rows, drawn here (standard deviation 1, truncated at two) and kept with the weights.
    state_std: another standard deviation of these draws, or a factor of the other two. The states of a core with
    several (`num_states`) start alike, but each from a vector of its own. boundary: what happens between two steps;
    None: nothing. Raises `UserError` for another name, for "vector" without a width, and for a core that is no `Block`.
    """

    vectors: Tensor | None
    """The vectors (states, D) of "vector"."""

    def __init__(self, core: nn.Module, *, state_init: str = "zero", state_std: float | None = None,
                 width: int | None = None, boundary: Boundary | None = None):
        super().__init__()
        require_block(core)
        if state_init not in STATE_INITS:
            raise UserError(f"state_init '{state_init}' is unknown{did_you_mean(state_init, STATE_INITS)}")
        if state_init == "vector" and width is None:
            raise UserError("state_init vector draws a vector, and its width is not given; pass width=")
        self.core = core
        self.boundary: Boundary = Boundary() if boundary is None else boundary
        self.state_init = state_init
        self.state_std = state_std
        self.register_buffer("vectors", _start_vectors(self.num_states, width) if state_init == "vector" else None)

    @property
    def num_states(self) -> int:
        """Number of states that travel as one tensor, side by side; 1 for a core without `num_states`."""
        return getattr(self.core, "num_states", 1)

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the core, which steps run in turn; 1 for a core without `num_blocks`."""
        return getattr(self.core, "num_blocks", 1)

    def block_at(self, index: Any) -> int | None:
        """Index of the block that step `index` runs; None if there is only one."""
        return index % self.num_blocks if self.num_blocks > 1 else None

    @property
    def needs_noise(self) -> bool:
        """True if the initial state is drawn at random."""
        return self.state_init in ("like-init", "noise")

    def initial_state(self, e: State, noise: State | None = None) -> LoopState:
        """The loop's state before the first step, of a plain boundary (B, L, D) or (B, L, states D); `like-init` and
        `noise` need `noise`, standard normal draws of e's shape. Raises `UserError` if it is missing or has another
        shape, or if another `state_init` would ignore it."""
        if noise is not None and not self.needs_noise:
            raise UserError(f"state_init {self.state_init} draws nothing, so noise= would be ignored; leave it out, or "
                            f"choose like-init or noise")
        vectors = [None] * self.num_states if self.vectors is None else self.vectors
        parts = [STATE_INITS[self.state_init](e, noise, vector) for vector in vectors]
        state = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        state = state if self.state_std is None else self.state_std / USUAL_STD[self.state_init] * state
        return self.boundary.enter(state)

    def leave(self, state: States) -> States:
        """The state that coda, heads and exits read, of a plain boundary, from the loop's state."""
        return self.boundary.leave(state)

    def step(self, state: States, e: State, cond: Tensor | None = None, rows: Any = None, *,
             block: int | None = None, index: Index = None) -> States:
        """Run one step: the core, or its `block` if it has several, inside the boundary. index: the number of steps
        before it, one for all sequences or one each, which a step embedding needs. Raises `UserError` if it is missing
        there, and if the core does not take the `rows` of a model; an error inside the core is raised unchanged, with
        a note on how the core was called."""
        return self.boundary(partial(self.apply_core, rows=rows, block=block), index, state, e, cond)

    def apply_core(self, state: States, e: State, cond: Tensor | None, rows: Any, block: int | None) -> States:
        """Apply the core once, without the boundary."""
        told = () if rows is None else (rows,)
        chosen = {} if block is None else {"block": block}  # not the index: one compiled graph per block
        try:
            return self.core(state, e, cond, *told, **chosen)
        except (TypeError, ValueError, AttributeError, AssertionError) as error:
            if rows is not None and isinstance(error, TypeError) and "positional argument" in str(error):
                raise UserError(f"the core does not take the arguments that its model passes ({error}); give its "
                                f"forward a fourth argument: (state, e, cond, rows)") from error
            if not isinstance(error, UserError):
                error.add_note("The loop calls a block as (state, e, cond), and with rows= as (state, e, cond, rows); "
                               "a layer of another library needs an adapter, as in docs/modules.md.")
            raise

    def forward(self, e: State, num_steps: int, *, state: States | None = None, noise: State | None = None,
                cond: Tensor | None = None, callback: Callable[[int, States], Any] | None = None,
                rows: RowsOfStep | None = None) -> States:
        """Run `num_steps` steps, all with gradient; 0 gives the initial state. Arguments as in `unroll`. Raises
        `UserError` for a negative number."""
        return self.unroll(e, no_grad=0, grad=whole_number("num_steps", num_steps), state=state, noise=noise, cond=cond,
                           callback=callback, rows=rows)

    def unroll(self, e: State, *, no_grad: int | Tensor, grad: int | Tensor, state: States | None = None,
               noise: State | None = None, cond: Tensor | None = None,
               callback: Callable[[int, States], Any] | None = None,
               rows: RowsOfStep | None = None, disturb: Disturb | None = None, first: int = 0,
               damping: float = 0.0) -> States:
        """Run `no_grad` steps without gradient, then `grad` steps with it (Huginn's truncated BPTT).

        Tensors (B,) set one depth per sequence, in any order: all sequences first run their steps without gradient,
        then those with it. A finished sequence leaves the batch, so nothing is computed for it. `rows(index, numbers)`
        returns the `rows` argument of step `index` for the sequences with these indices (None: all, in order).
        `callback(index, state)` gets the state of all sequences after each step; if it returns True, the loop stops.
        `index` counts the steps that the loop has run, from `first`, the number of those that led to a given `state`.
        `disturb` changes the state before each step; `damping` is the fraction of it that a step keeps. `state` may be
        a tuple of tensors (B, ...) that the core takes and returns; without it the loop starts from `initial_state`,
        one tensor.

        Raises `UserError` for negative depths, for depths of another number of sequences, for `noise` beside a `state`,
        and for a core that returns another shape than it was given.
        """
        if state is not None and noise is not None:
            raise UserError("noise= draws the initial state, and state= gives it; pass one of the two")
        state = self.initial_state(e, noise) if state is None else state
        no_grad, grad = one_for_all("no_grad", no_grad), one_for_all("grad", grad)
        if isinstance(no_grad, Tensor) or isinstance(grad, Tensor):
            return self._unroll_rows(state, _Rounds(self, e, cond, callback, rows, disturb, first, damping),
                                     no_grad, grad)
        no_grad, grad = whole_number("no_grad", no_grad), whole_number("grad", grad)
        for index in range(first, first + no_grad + grad):
            with torch.set_grad_enabled(index >= first + no_grad and torch.is_grad_enabled()):
                state = state if disturb is None else disturb(state, index, None)
                new = self.checked_step(state, e, cond, rows and rows(index, None), index)
                state = damped(state, new, damping)
            if callback is not None and callback(index, state):
                break
        return state

    def _unroll_rows(self, start: States, rounds: "_Rounds", no_grad: int | Tensor, grad: int | Tensor) -> States:
        if self.num_blocks > 1:
            raise UserError("depth per sequence needs a tied core (one block); set recurrence.per_sequence to false")
        batch = len(rounds.e)
        no_grad, grad = counts_by_row("no_grad", no_grad, batch), counts_by_row("grad", grad, batch)
        # Deepest first: one order for both rounds if n and k = min(p, k_max) grow with the depth p.
        deepest = sorted(range(batch), key=lambda row: -(no_grad[row] + grad[row]))
        with torch.no_grad():
            state = rounds.run(start, no_grad, deepest, [0] * batch)
        if torch.is_grad_enabled():
            state = each(lambda new, old: _with_gradient_of(old, new, no_grad), state, start)
        return rounds.run(state, grad, deepest, no_grad)

    def checked_step(self, state: States, e: State, cond: Tensor | None, rows: Any, index: int | Tensor) -> States:
        """Run step `index`, one for all sequences or one each. Raises `UserError` if the returned state has another
        shape than the given one."""
        new = self.step(state, e, cond, rows, block=self.block_at(index), index=index)
        if _shapes(new) != _shapes(state):
            raise UserError(f"the core was given a state of shape {_shapes(state)} but returned {_shapes(new)}; "
                            f"a core takes (state, e, cond) and returns the next state, of the same shape")
        return new

    def compile_step(self, **settings: Any) -> None:
        """`torch.compile` one step, never the loop: the graph does not depend on the number of steps.

        Compiles in place, as `nn.Module.compile`: weights and their names stay; a copy or a pickle has its own weights
        and is not compiled. `settings` go to `torch.compile`.
        """
        self.core.compile(**self._own_graphs() | settings)

    def _own_graphs(self) -> dict:
        """Settings that give each loop of a process its own recompile limit, if torch supports it (2.13): depths per
        sequence take up to six graphs per block, and beyond eight in total torch would run uncompiled."""
        if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
            return {}
        return {"isolate_recompiles": True, "recompile_limit": 8 * self.num_blocks}


class _Rounds:
    """The two rounds of an unroll with one depth per sequence: steps without gradient, then steps with it."""

    def __init__(self, loop: RecurrentDepth, e: State, cond: Tensor | None, callback: Callable | None,
                 rows: RowsOfStep | None, disturb: Disturb | None, first: int, damping: float):
        self.loop, self.e, self.cond, self.callback, self.rows = loop, e, cond, callback, rows
        self.disturb, self.damping = disturb, damping
        self.first, self.index, self.stopped = first, first, False

    def run(self, state: States, depths: list[int], deepest: list[int], done: list[int]) -> States:
        """The state after `depths[row]` more steps of each sequence, which has run `done[row]` before. Sequences are
        sorted by the steps they have left, ties in the order `deepest`, so the running ones are a prefix."""
        order = sorted(deepest, key=lambda row: -depths[row])
        longest = depths[order[0]] if order else 0
        if not longest or self.stopped:
            return state
        place = to_device(torch.tensor(order), self.e.device)
        back, e, cond = torch.argsort(place), self.e[place], None if self.cond is None else self.cond[place]
        state = _rows_of(state, place)
        for step in range(longest):
            num = sum(depth > step for depth in depths)
            first = slice(num)
            indices, given = [self.first + done[row] + step for row in order[:num]], _rows_of(state, first)
            if self.disturb is not None:
                given = self.disturb(given, indices, order[:num])
            new = self.loop.checked_step(given, e[first], None if cond is None else cond[first],
                                         self.rows and self.rows(self.index, place[first]), _index(indices))
            new = damped(given, new, self.damping)
            state = each(lambda *parts: torch.cat(parts), new, _rows_of(state, slice(num, None))) \
                if num < len(order) else new
            if self._stops(state if self.callback is None else _rows_of(state, back)):
                break
        return _rows_of(state, back)

    def _stops(self, state: States) -> bool:
        """Count a finished step; True if the callback stops the loop."""
        self.stopped = self.callback is not None and bool(self.callback(self.index, state))
        self.index += 1
        return self.stopped


def _index(of_rows: list[int]) -> int | Tensor:
    """The index of each sequence's step: one number if it is the same for all."""
    return of_rows[0] if len(set(of_rows)) == 1 else torch.tensor(of_rows)


def damped(before: States, after: States, damping: float) -> States:
    """d s + (1 - d) step(s): the state after a step that keeps the fraction d of the state before it."""
    return after if damping == 0 else each(lambda old, new: damping * old + (1 - damping) * new, before, after)


def each(function: Callable[..., Tensor], *states: Parts) -> Parts:
    """Apply the function to a state's tensor, or to each of its tensors."""
    return tuple(map(function, *states)) if isinstance(states[0], tuple) else function(*states)


def _rows_of(state: Parts, rows: Tensor | slice) -> Parts:
    return each(lambda part: part[rows], state)


def _shapes(state: Any) -> Any:
    if isinstance(state, tuple):
        return tuple(map(_shapes, state))
    return tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__


def _with_gradient_of(old: Tensor, new: Tensor, no_grad: list[int]) -> Tensor:
    """`new`, but sequences that ran no step without gradient keep the gradient of `old`."""
    if not old.requires_grad or new is old:
        return new
    ran = to_device(torch.tensor([steps > 0 for steps in no_grad]), new.device)
    return torch.where(ran.view(-1, *[1] * (new.ndim - 1)), new, old)


def _normal(e: State, noise: State | None, vector: Tensor | None) -> State:
    if noise is None:
        raise UserError("this state_init needs standard normal draws of the state's shape; pass noise=, or choose zero")
    if noise.shape != e.shape:
        raise UserError(f"noise has the shape {tuple(noise.shape)}, but needs that of e, {tuple(e.shape)}; draw it "
                        f"with torch.randn_like(e)")
    return noise.to(e.dtype)


def _like_init(e: State, noise: State | None, vector: Tensor | None) -> State:
    """Huginn's initial state: normal with std sqrt(2 / (5 D)) * sqrt(D), truncated at three standard deviations."""
    normal = _normal(e, noise, vector)
    uniform = torch.special.ndtr(normal.to(widest(normal.device)))
    low = torch.special.ndtr(torch.tensor(-3.0, dtype=torch.float64))
    return (torch.special.ndtri(low + (1 - 2 * low) * uniform) * math.sqrt(2 / 5)).to(e.dtype)


def _start_vectors(num: int, width: int) -> Float[Tensor, "states width"]:
    """Normal vectors truncated at two standard deviations, scaled so that their own is 1, as in HRM and TRM."""
    std = 1 / STD_WITHIN_TWO
    return nn.init.trunc_normal_(torch.empty(num, width), std=std, a=-2 * std, b=2 * std)


STD_WITHIN_TWO = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
"""Standard deviation of a standard normal number truncated at two: 0.8796."""
STATE_INITS: dict[str, Callable[[State, State | None, Tensor | None], State]] = {
    "like-init": _like_init,
    "noise": _normal,
    "zero": lambda e, noise, vector: torch.zeros_like(e),
    "embedding": lambda e, noise, vector: e,
    "vector": lambda e, noise, vector: vector.to(e.dtype).expand_as(e),
}
"""Name -> (e, standard normal draws or None, vector of the state or None) -> state."""
USUAL_STD = {"like-init": math.sqrt(2 / 5), "noise": 1.0, "zero": 1.0, "embedding": 1.0, "vector": 1.0}
"""Default standard deviation of a random state, before truncation."""


def init_weights(module: nn.Module, width: int, effective_depth: int) -> None:
    """Huginn's initialisation (Takase et al. 2024) in place: std sqrt(2 / (5 D)), truncated at three standard
    deviations; output projections divided by sqrt(2 * effective_depth), which counts the core once per loop step."""
    std = math.sqrt(2 / (5 * width))
    own = {id(each) for block in module.modules() if isinstance(block, OwnBlock) for each in block.modules()}
    for name, child in module.named_modules():
        if id(child) in own:
            continue
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
