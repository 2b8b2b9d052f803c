"""The state from which a fixed-point solver starts (`fixed_point.head_start`): the initial state, or a proposal.

    proposal  p = step(initial state, e), with gradient; the solver starts from detach(p)
    loss      cross-entropy(read(s*)) + w * cross-entropy(read(p))

Fein-Ashley and Rashidinejad 2026 (Attractor, arXiv 2605.12466) start the solver from the output of a backbone, which
training moves close to the fixed point, so that inference can leave the solver out. Their proposal has no loss of its
own and is the prelude's output, which is `model.state_init` embedding here. This one is the state of a first pass, so
depth 1 of `looped eval` is the model without its solver.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from looped.config.recurrence import FixedPointConfig

Step = Callable[[Tensor], Tensor]
Read = Callable[[Tensor], Tensor]
"""State -> mean loss of the tokens decoded from it."""


class NoHeadStart:
    """The solver starts from the initial state."""

    passes: ClassVar[int] = 0
    """Applications of the core, and readouts, with gradient, beside those of the solver and its gradient."""

    def __init__(self, config: FixedPointConfig):
        self.config = config

    def proposal(self, step: Step, state: Tensor) -> Tensor:
        """The state from which the solver starts."""
        return state

    def joined(self, loss: Tensor, proposal: Tensor, found: Tensor, read: Read) -> tuple[Tensor, dict[str, Tensor]]:
        """(the loss with that of the proposal, further metrics). found: the fixed point."""
        return loss, {}


class FirstPass(NoHeadStart):
    """The solver starts from the state of a first pass, which has a loss of its own. metrics: `head_start_loss`, and
    `head_start_distance`, that of the proposal from the fixed point relative to the norm of the latter."""

    passes = 1

    def proposal(self, step: Step, state: Tensor) -> Tensor:
        return step(state)

    def joined(self, loss: Tensor, proposal: Tensor, found: Tensor, read: Read) -> tuple[Tensor, dict[str, Tensor]]:
        own = read(proposal)
        with torch.no_grad():
            size = found.flatten(1).norm(dim=1).clamp(min=1e-12)
            distance = ((proposal - found).flatten(1).norm(dim=1) / size).mean()
        return loss + self.config.head_start_weight * own, {"head_start_loss": own.detach(),
                                                            "head_start_distance": distance}


HEAD_STARTS: dict[str, type[NoHeadStart]] = {"none": NoHeadStart, "pass": FirstPass}
