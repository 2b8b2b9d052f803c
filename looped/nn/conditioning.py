"""Noise-level conditioning: a level becomes a vector, the vector becomes AdaLN's shift, scale and gate.

Every modulation starts at zero (Peebles & Xie 2023, AdaLN-Zero), and the gate is 1 + its value, so a conditioned
network starts as exactly the unconditioned one.
"""

import math

import torch
from torch import Tensor, nn

from looped.devices import to_device
from looped.nn.frequencies import Frequencies
from looped.nn.fused import compute_dtype
from looped.nn.projection import cast_for
from looped.tensor_types import Float


class LevelEmbedding(Frequencies):
    """Embedding of a scalar level per sequence (or token): sinusoids of geometric frequencies, then a small MLP."""

    def __init__(self, width: int, *, num_frequencies: int = 32, max_frequency: float = 64.0):
        super().__init__(num_frequencies)
        self.max_frequency = max_frequency
        self.reset_frequencies()
        self.mlp: nn.Sequential = nn.Sequential(
            nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def computed(self) -> Tensor:
        return torch.logspace(0, math.log2(self.max_frequency), len(self.frequencies), base=2.0, device="cpu")

    def forward(self, level: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        angles = to_device(level.float(), self.frequencies.device).unsqueeze(-1) * self.frequencies
        return self.mlp(cast_for(self.mlp[0], torch.cat([angles.sin(), angles.cos()], dim=-1)))


class Modulation(nn.Module):
    """Shift, scale and gate for `num_branches` residual branches from one conditioning vector."""

    def __init__(self, cond_width: int, width: int, *, num_branches: int = 2):
        super().__init__()
        self.num_branches = num_branches
        self.linear: nn.Linear = nn.Linear(cond_width, 3 * num_branches * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, cond: Float[Tensor, "batch cond"] | Float[Tensor, "batch length cond"],
                ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """A list of (shift, scale, gate), each (batch, 1 or length, width), one per branch in order."""
        if cond.dim() == 2:
            cond = cond.unsqueeze(1)  # B 1 C
        parts = self.linear(nn.functional.silu(cond)).to(compute_dtype(cond)).chunk(3 * self.num_branches, dim=-1)
        return [(parts[i], parts[i + 1], 1 + parts[i + 2]) for i in range(0, len(parts), 3)]
