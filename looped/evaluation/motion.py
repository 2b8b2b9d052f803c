"""How a latent moves from step to step: its size, its changes, and whether these shrink."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Latent = Float[Tensor, "num length width"]


class Motion:
    """Fed with the state, or the clean estimate, of every problem after each step. Lists with an entry (num,) a step:

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
        """The latent after one more step."""
        latent = self._that_count(latent)
        size = norm(latent)
        count = latent[0].numel() if self.cells is None else self.cells.sum(1).clamp(min=1) * latent.shape[-1]
        self.sizes.append((size / torch.as_tensor(count, device=size.device).sqrt()).double().cpu())
        moved = None if self.latent is None else norm(latent - self.latent)
        self.changes.append(None if moved is None else (moved / size.clamp_min(1e-30)).double().cpu())
        both = moved is not None and self._moved is not None
        self.ratios.append((moved / self._moved.clamp_min(1e-30)).double().cpu() if both else None)
        self.latent, self._moved = latent, moved

    def _that_count(self, latent: Latent) -> Latent:
        return latent.float() if self.cells is None else latent.float() * self.cells.unsqueeze(-1)


def norm(latent: Latent) -> Float[Tensor, "num"]:
    """|s| of every problem."""
    return latent.flatten(1).norm(dim=1)
