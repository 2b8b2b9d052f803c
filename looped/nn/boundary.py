"""Boundary between two steps of a loop: parts around the pass through the core, each a module of its own.

    pass           x -> core(x, e, cond)
    AddedStep      x -> pass(x + W f(t))                     t the index of the step, from 0; f(0) = 0
    ToldStep       x -> core(x, e, cond = f(t))              the layers of the core are modulated (StepModulation)
    ScaledUpdate   x -> x + (pass(x) - x) / N                N the trained number of steps
    Streams        H -> M H + w pass(r . H)                  m parallel streams H

A boundary of no parts is the plain loop. Step embeddings and streams start as exactly the plain loop, without random
draws, so the other weights of a model are the same with and without them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm

from looped.devices import to_device
from looped.errors import UserError
from looped.nn.conditioning import Modulation
from looped.nn.frequencies import Frequencies
from looped.tensor_types import Float, Int

States = Tensor | tuple[Tensor, ...]
Pass = Callable[[Any, Tensor, Tensor | None], Any]
"""(state, e, cond) -> next state."""
Index = int | Int[Tensor, "batch"] | None
"""The number of loop steps before this one, the same for all sequences or one each; None: not known."""
State = Float[Tensor, "batch length width"]

NUM_FEATURES = 16
"""Numbers that tell the core its step."""


class Part(nn.Module):
    """A part of a boundary: `(pass, index, state, e, cond) -> next state`, which calls the pass once."""

    keeps_passes: bool = True
    """True if the state after a step is what the pass returned, so that a norm at the end of the core is the last."""

    def enter(self, state: State) -> Tensor:
        """The loop's state from an initial state of the core."""
        return state

    def leave(self, state: Tensor) -> State:
        """The state that is read out, from the loop's state."""
        return state

    def forward(self, run: Pass, index: Index, state: Tensor, e: Tensor, cond: Tensor | None) -> Tensor:
        raise NotImplementedError


class Boundary(nn.Module):
    """Parts around each pass through the core, the innermost first."""

    def __init__(self, *parts: Part):
        super().__init__()
        self.parts: nn.ModuleList = nn.ModuleList(parts)

    @property
    def keeps_passes(self) -> bool:
        """True if the state after a step is what the pass returned."""
        return all(part.keeps_passes for part in self.parts)

    def enter(self, state: State) -> Tensor:
        """The loop's state from an initial state of the core, one tensor."""
        for part in self.parts:
            state = part.enter(state)
        return state

    def leave(self, state: States) -> States:
        """The state that coda, heads and exits read, from the loop's state."""
        for part in reversed(self.parts):
            state = part.leave(state)
        return state

    def forward(self, run: Pass, index: Index, state: States, e: Tensor, cond: Tensor | None) -> States:
        for part in self.parts:
            run = partial(part, run, index)
        return run(state, e, cond)


class StepFeatures(Frequencies):
    """f(t) = [sin(w u), 1 - cos(w u)] with u = ln(1 + t) and frequencies w between 1/4 and 4: zero at the first step.

    In the logarithm of the step, neighbouring deep steps are told nearly the same, and a loop run far beyond its
    trained depth is told few values that it was not trained with: ln 65 is three times ln 4. (Universal Transformer,
    Dehghani et al. 2019, arXiv 1807.03819, adds sinusoids of t itself.) Raises UserError for a step without index.
    """

    def __init__(self):
        super().__init__(NUM_FEATURES // 2)
        self.reset_frequencies()

    def computed(self) -> Tensor:
        return torch.logspace(-2, 2, len(self.frequencies), base=2.0, device="cpu")

    def forward(self, index: Index) -> Float[Tensor, "rows features"]:
        """The features of one step (1, F), or of the step of each sequence (B, F); float32."""
        if index is None:
            raise UserError("this loop has a step embedding (model.step_embedding), so a single step needs its index; "
                            "call model.step with rows=Rows(step=...), or run the loop by model.unroll")
        device = self.frequencies.device
        if isinstance(index, Tensor):
            at = to_device(index, device).float()
        else:
            at = torch.full((1,), float(index), device=device)
        angles = torch.log1p(at).unsqueeze(-1) * self.frequencies
        return torch.cat([angles.sin(), 1 - angles.cos()], dim=-1)


class AddedStep(Part):
    """`W f(t)` added to the core's input; W starts at zero, and the first step adds nothing."""

    def __init__(self, width: int):
        super().__init__()
        self.features: StepFeatures = StepFeatures()
        self.weight: nn.Parameter = nn.Parameter(torch.zeros(width, NUM_FEATURES))

    def forward(self, run: Pass, index: Index, state: Tensor, e: Tensor, cond: Tensor | None) -> Tensor:
        added = linear(self.features(index).to(self.weight.dtype), self.weight)
        return run(state + added.unsqueeze(1).to(state.dtype), e, cond)


class ToldStep(Part):
    """f(t) as `cond` of the core, whose layers are modulated by it. Raises UserError for another cond."""

    def __init__(self):
        super().__init__()
        self.features: StepFeatures = StepFeatures()

    def forward(self, run: Pass, index: Index, state: Tensor, e: Tensor, cond: Tensor | None) -> Tensor:
        if cond is not None:
            raise UserError("ToldStep gives the core its step as cond, and cond= was given too; leave cond out, or use "
                            "AddedStep, which adds the step to the state")
        return run(state, e, self.features(index).to(state.dtype).expand(len(state), -1))  # one row per sequence


class StepModulation(Modulation):
    """AdaLN-Zero of a layer by the features of the step, without bias: the first step is the plain layer for any
    weights, so a single pass computes what a model without step embedding can."""

    def __init__(self, width: int):
        nn.Module.__init__(self)
        self.num_branches = 2
        self.linear: nn.Module = _Map(NUM_FEATURES, 3 * self.num_branches * width)


class _Map(nn.Module):
    """A linear map without bias whose weight starts at zero, without random draws."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.zeros(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.to(self.weight.dtype), self.weight)


class ScaledUpdate(Part):
    """`x + (pass(x) - x) / N`: the update of a step divided by the trained number of steps."""

    keeps_passes = False

    def __init__(self, num_steps: int):
        super().__init__()
        self.num_steps = num_steps

    def forward(self, run: Pass, index: Index, state: Tensor, e: Tensor, cond: Tensor | None) -> Tensor:
        return torch.lerp(state, run(state, e, cond).to(state.dtype), 1 / self.num_steps)


class Streams(Part):
    """m parallel streams H (B, L, m, D): `H <- M H + w pass(r . H)`, and `l . H` is read out.

    Hyper-connections (Zhu et al. 2024, arXiv 2409.19606, equations 2 to 5) around the whole core, as in Hyperloop
    (arXiv 2604.21254): r reads the core's input from the streams, w writes its output to them, M mixes them. There the
    output is the core's update and M starts as the identity; M - w r is our M. The weights are the same at every step,
    so any depth is defined. At the start stream 0 is the state of the plain loop, and stream j a moving average of it,
    H_j <- (1 - 2^-j) H_j + 2^-j H_0: equal streams would get equal gradients and stay equal.

    dynamic: r, w and M also depend on the streams: each stream, normalised, adds `s tanh(V h)` to its column of M and
    to its element of r and w, where V starts at zero and s at 0.01.
    """

    keeps_passes = False

    def __init__(self, width: int, num: int, *, dynamic: bool = False):
        super().__init__()
        shares = 0.5 ** torch.arange(num)
        first = torch.eye(num)[0]
        self.num = num
        self.read: nn.Parameter = nn.Parameter(first.clone())
        self.write: nn.Parameter = nn.Parameter(shares.clone())
        # One vector: weight decay, which acts on matrices, would pull the streams to zero.
        self.mix: nn.Parameter = nn.Parameter(torch.diag(1 - shares).flatten())
        self.last: nn.Parameter = nn.Parameter(first.clone())
        self.dynamic: DynamicMixing | None = DynamicMixing(width, num) if dynamic else None

    def enter(self, state: State) -> Float[Tensor, "batch length streams width"]:
        return state.unsqueeze(2).expand(-1, -1, self.num, -1).contiguous()

    def leave(self, state: Float[Tensor, "batch length streams width"]) -> State:
        return torch.einsum("m,blmd->bld", self.last.to(state.dtype), state)

    def forward(self, run: Pass, index: Index, state: Tensor, e: Tensor, cond: Tensor | None) -> Tensor:
        dtype = state.dtype
        read, write, mix = self.read, self.write, self.mix.view(self.num, self.num)
        if self.dynamic is not None:
            read, write, mix = (own + more for own, more in zip((read, write, mix), self.dynamic(state), strict=True))
        new = run((read.to(dtype).unsqueeze(-1) * state).sum(2), e, cond).to(dtype)
        mixed = (mix.to(dtype) @ state).to(dtype)
        return mixed + write.to(dtype).unsqueeze(-1) * new.unsqueeze(2)


class DynamicMixing(nn.Module):
    """The parts of r, w (B, L, m) and M (B, L, m, m) that depend on the streams."""

    def __init__(self, width: int, num: int):
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.zeros(num + 2, width))
        self.scale: nn.Parameter = nn.Parameter(torch.full((num + 2,), 0.01))

    def forward(self, state: Float[Tensor, "batch length streams width"]) -> tuple[Tensor, Tensor, Tensor]:
        h = rms_norm(state, state.shape[-1:]).to(self.weight.dtype)
        parts = self.scale * torch.tanh(linear(h, self.weight))  # B L m (m + 2)
        return parts[..., 0], parts[..., 1], parts[..., 2:].transpose(-1, -2)


STEP_EMBEDDINGS: dict[str, Callable[[int], list[Part]]] = {
    "none": lambda width: [], "add": lambda width: [AddedStep(width)], "modulate": lambda width: [ToldStep()]}
"""`model.step_embedding` -> width -> the parts for it."""
