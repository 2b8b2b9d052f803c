"""The residual of a loop or a solver: the change of its latent (a state, or a clean estimate) from step to step."""

import torch
from torch import Tensor

from looped.data.batch import Batch
from looped.tensor_types import Float, Int

WINDOW = 3
"""Last steps over which a residual is averaged, the `convergence_window` of EqR's code."""


class Motion:
    """Changes of the latents of a batch in the last `WINDOW` steps of each problem, relative to their norms, over the
    predicted cells."""

    def __init__(self, batch: Batch):
        self.cells: Tensor = batch.sought.unsqueeze(-1)
        self.last: Float[Tensor, "window batch"] = torch.full((WINDOW, len(batch)), torch.nan,
                                                              device=batch.inputs.device)

    def take(self, rows: Int[Tensor, "rows"], before: Float[Tensor, "rows length *state"],
             after: Float[Tensor, "rows length *state"]) -> None:
        """Record a step of the problems with these indices."""
        change, norm = moved(before, after, self.cells[rows])
        new = change / norm.clamp_min(1e-30)
        self.last = self.last.index_copy(1, rows, torch.cat([self.last[1:, rows], new.unsqueeze(0)]))

    @property
    def residual(self) -> Float[Tensor, "batch"]:
        """The mean change; 0 for problems without a step that has one before it."""
        return self.last.nanmean(0).nan_to_num(0.0)


def moved(before: Float[Tensor, "rows length *state"], after: Float[Tensor, "rows length *state"],
          cells: Tensor) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """(norm of the change, norm of the latent after it) of each problem over its `cells` (B, L, 1); a state
    of several streams is (B, L, m, D)."""
    before, after = before.float().flatten(2), after.float().flatten(2)
    return ((after - before) * cells).flatten(1).norm(dim=1), (after * cells).flatten(1).norm(dim=1)
