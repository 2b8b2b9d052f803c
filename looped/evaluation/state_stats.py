"""Step-to-step statistics of a latent: its root mean square, its relative change, and the contraction."""

from collections.abc import Mapping

import torch
from torch import Tensor

from looped.tensor_types import Bool, Float

GROWING = 1.5
"""Growth factor over the second half of the steps above which a latent counts as growing. A random walk grows by 1.41,
a constant increment per step by 2."""

Latent = Float[Tensor, "num length ..."]


class StateStats:
    """Statistics of the state, or the clean estimate, of every problem. Lists with one entry (num,) per step:

    sizes    root mean square over the cells that count (`cells`, or all)
    changes  |s_t - s_{t-1}| / |s_t|; None at the first step
    ratios   |s_t - s_{t-1}| / |s_{t-1} - s_{t-2}|, the contraction; None at the first two
    """

    def __init__(self, cells: Bool[Tensor, "num length"] | None = None):
        self.cells = cells
        self.sizes: list[Tensor] = []
        self.changes: list[Tensor | None] = []
        self.ratios: list[Tensor | None] = []
        self.latent: Latent | None = None
        self._moved: Tensor | None = None

    def take(self, latent: Latent) -> None:
        """Add the latent after one more step."""
        latent = self._that_count(latent)
        size = norm(latent)
        count = latent[0].numel() if self.cells is None else self.cells.sum(1).clamp(min=1) * latent.shape[-1]
        self.sizes.append((size / torch.as_tensor(count, device=size.device).sqrt()).cpu().double())
        moved = None if self.latent is None else norm(latent - self.latent)
        self.changes.append(None if moved is None else (moved / size.clamp_min(1e-30)).cpu().double())
        both = moved is not None and self._moved is not None
        self.ratios.append((moved / self._moved.clamp_min(1e-30)).cpu().double() if both else None)
        self.latent, self._moved = latent, moved

    def _that_count(self, latent: Latent) -> Latent:
        latent = latent.flatten(2)  # of several streams, side by side
        return latent.float() if self.cells is None else latent.float() * self.cells.unsqueeze(-1)


def growth(sizes: Mapping[int, float], latent: str = "state") -> str:
    """Sentence reporting a latent that grows with depth, from its root mean square at 4 steps or more; "" if it does
    not grow."""
    deepest = max(sizes, default=0)
    if deepest < 4 or not sizes[deepest] > GROWING * sizes[deepest // 2]:
        return ""
    told = [depth for depth in (1, 4, 16, 64, 256) if depth < deepest and depth in sizes] + [deepest]
    return (f"the {latent} grows with depth: its root mean square is {', '.join(f'{sizes[at]:.3g}' for at in told)} "
            f"at {', '.join(map(str, told))} steps")


def norm(latent: Latent) -> Float[Tensor, "num"]:
    """The norm |s| of each problem's latent."""
    return latent.flatten(1).norm(dim=1)
