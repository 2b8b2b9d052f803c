"""Injections of the encoded input into each loop step: modules with `(state, e) -> state`, all of shape (B, L, D).

Without injection a deep loop forgets its input; `linear` is Huginn's (Geiping et al. 2025, section 3), `diagonal`
Parcae's linear time-invariant form whose spectral radius is below one by construction.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looped.errors import UserError, did_you_mean
from looped.tensor_types import Float

State = Float[Tensor, "batch length width"]


class NoInjection(nn.Module):
    """The state unchanged; the input reaches the core through attention (concat and context)."""

    def __init__(self, width: int):
        super().__init__()

    def forward(self, state: State, e: State) -> State:
        return state


class Add(nn.Module):
    """`state + e`."""

    def __init__(self, width: int):
        super().__init__()

    def forward(self, state: State, e: State) -> State:
        return state + e


class LinearInjection(nn.Module):
    """`W [state; e]`, no bias, the state first (Huginn)."""

    def __init__(self, width: int):
        super().__init__()
        self.mix: nn.Linear = nn.Linear(2 * width, width, bias=False)

    def start_at_input(self) -> "LinearInjection":
        """Set W = [0 | I] in place: until training moves W, every step gets e and every depth computes the same. A loop
        around pretrained layers thus starts as those layers (McLeish et al. 2025, arXiv 2511.07384)."""
        width = self.mix.out_features
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(width, 2 * width).roll(width, dims=1))
        return self

    def forward(self, state: State, e: State) -> State:
        return self.mix(torch.cat([state, e], dim=-1))


class Gated(nn.Module):
    """`g * state + (1 - g) * e` with `g = sigmoid(W [state; e] + b)`, one gate per coordinate."""

    def __init__(self, width: int):
        super().__init__()
        self.gate: nn.Linear = nn.Linear(2 * width, width)

    def forward(self, state: State, e: State) -> State:
        gate = torch.sigmoid(self.gate(torch.cat([state, e], dim=-1)))
        wide = torch.promote_types(state.dtype, e.dtype)  # under autocast they may differ
        return torch.lerp(e.to(wide), state.to(wide), gate.to(wide))


class Diagonal(nn.Module):
    """`exp(-dt A) * state + dt * (B e)`, A > 0 and dt > 0 per coordinate (Parcae): the decay lies in (0, 1).

    Starts with A = 1, B = I and a decay of sqrt(1/5), Parcae's values.
    """

    def __init__(self, width: int):
        super().__init__()
        step = -math.log(math.sqrt(1 / 5))
        self.log_a: nn.Parameter = nn.Parameter(torch.zeros(width))
        self.dt_bias: nn.Parameter = nn.Parameter(torch.full((width,), math.log(math.expm1(step))))  # softplus^-1(step)
        self.mix: nn.Linear = nn.Linear(width, width, bias=False)  # whose draws the seeds of earlier runs count on
        self.reset_mix()

    @property
    def decay(self) -> Float[Tensor, "width"]:
        return torch.exp(-F.softplus(self.dt_bias) * self.log_a.exp())

    def reset_mix(self) -> None:
        nn.init.eye_(self.mix.weight)

    def forward(self, state: State, e: State) -> State:
        return self.decay * state + F.softplus(self.dt_bias) * self.mix(e)


INJECTIONS = {"none": NoInjection, "add": Add, "linear": LinearInjection, "gated": Gated, "diagonal": Diagonal}


def build_injection(name: str, width: int) -> nn.Module:
    """The injection of that name. Raises `UserError` for an unknown one."""
    if name not in INJECTIONS:
        raise UserError(f"injection '{name}' is unknown{did_you_mean(name, INJECTIONS)}")
    return INJECTIONS[name](width)
