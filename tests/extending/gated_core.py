"""A core of somebody else's in one file: torch's gated recurrent unit, one for each layer, applied to each row."""

import torch
from torch import nn


class GatedCore(nn.Module):
    """state' = GRU(e, state), told its noise level by a shift of its input where there is one."""

    def __init__(self, width, num_layers, cond_width):
        super().__init__()
        self.cells = nn.ModuleList(nn.GRUCell(width, width) for _ in range(num_layers))
        self.shift = nn.Linear(cond_width, width) if cond_width else None

    def forward(self, state, e, cond):
        if self.shift is not None:
            shift = self.shift(cond)  # of a sequence, or of each row where rows have levels of their own
            e = e + (shift if shift.ndim == 3 else shift.unsqueeze(1))
        for cell in self.cells:
            state = cell(e.flatten(0, 1), state.flatten(0, 1)).view_as(state)
        return state


class Leaky(nn.Module):
    """Rows that see the mean of all of them, which nobody asked this core about."""

    def __init__(self, width, num_layers, cond_width):
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, state, e, cond):
        return torch.tanh(self.map(state.mean(1, keepdim=True)) + e)


class Ahead(GatedCore):
    """A core that is given the attention mask, does not apply it, and reads the next row."""

    def forward(self, state, e, cond, rows):
        return super().forward(state, torch.cat([e[:, 1:], e[:, -1:]], 1), cond)
