"""Two states in one loop, TRM's core: an answer `y`, which alone is decoded, and a latent `z` behind it.

A loop step updates the latent `updates` times, then the answer once, all by the same net (Jolicoeur-Martineau 2025,
arXiv 2510.04871, figure 3, where a step is a recursion process and the net has two layers):

    z <- net(z, y + e)    updates times
    y <- net(y, z)

The second argument of the net is what it injects; with the injection `add` this is TRM's net(z + y + e) and
net(y + z). Both states travel as one tensor [y; z], so solvers, exits and probes see a state like any other.
"""

from typing import Any

import torch
from torch import Tensor, nn

from looped.nn.checks import whole_number
from looped.tensor_types import Float

Both = Float[Tensor, "batch length both"]


class TwoStates(nn.Module):
    """A block over two states of width D, [y; z] with the shape (B, L, 2 D), around a block `net` over one.

    updates: updates of the latent per step, 1 or more. e: (B, L, D). Each of the `updates + 1` runs of the net has its
    own part of a cache in `rows`. Raises `UserError` for fewer than one update.
    """

    num_states = 2
    """States in one tensor, which `RecurrentDepth` starts alike."""

    def __init__(self, net: nn.Module, *, updates: int):
        super().__init__()
        whole_number("updates", updates, 1)
        self.net = net
        self.updates = updates

    @property
    def keeps_mask(self) -> bool:
        """True if the net need not be tested for it (`LayerStack.keeps_mask`)."""
        return getattr(self.net, "keeps_mask", False)

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of the net."""
        return self.net.layers

    def forward(self, state: Both, e: Tensor, cond: Tensor | None = None, *rows: Any) -> Both:
        y, z = state.chunk(2, dim=-1)
        for number in range(self.updates):
            z = self.net(z, y + e, cond, *(each.at("update", number) for each in rows))
        y = self.net(y, z, cond, *(each.at("update", self.updates) for each in rows))
        return torch.cat([y, z], dim=-1)


def answer_of(state: Tensor, width: int) -> Tensor:
    """The part of a state that is decoded: its first `width` coordinates, the whole of a single state."""
    return state if state.shape[-1] == width else state[..., :width]
