"""Exit gate of Ouro (Zhu et al. 2025, arXiv 2510.25741): the probability to exit after each pass, from its state.

    lambda_i = sigmoid(w . h_i + b)
    p_i      = lambda_i (1 - lambda_1) ... (1 - lambda_{i-1});  the last pass has the remaining probability
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid

from looped.errors import UserError
from looped.nn.two_states import answer_of
from looped.tensor_types import Float

Odds = Float[Tensor, "batch length"]


class ExitGate(nn.Module):
    """Log-odds of lambda for each row of a state, from its answer, in float32 or wider.

    Its weights start at zero (lambda = 1/2) without random draws, so the other weights of a model are the same with and
    without it. Only a training rule that uses the gate trains it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.zeros(1, width), requires_grad=False)
        self.bias: nn.Parameter = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, state: Float[Tensor, "batch length states"]) -> Odds:
        dtype = torch.promote_types(torch.promote_types(state.dtype, self.weight.dtype), torch.float32)
        answer = answer_of(state, self.weight.shape[-1])
        with torch.autocast(state.device.type, enabled=False):
            return linear(answer.to(dtype), self.weight.to(dtype), self.bias.to(dtype)).squeeze(-1)


def gate_of(model: Any) -> ExitGate:
    """The exit gate of a model. Raises UserError if it has none."""
    gate = getattr(model, "exit_gate", None)
    if gate is None:
        raise UserError("the exit gate is needed, but this model has none; set model.exit_gate to true")
    return gate


def log_chances(odds: Float[Tensor, "steps batch length"]) -> Float[Tensor, "steps batch length"]:
    """ln p of every pass from the log-odds of all passes; the log-odds of the last pass are not used."""
    stays = logsigmoid(-odds[:-1]).cumsum(0)  # ln of the probability to reach the next pass
    before = torch.cat([torch.zeros_like(odds[:1]), stays])
    return before + torch.cat([logsigmoid(odds[:-1]), torch.zeros_like(odds[:1])])
