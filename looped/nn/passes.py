"""Several passes of one block in each loop step: a loop within the step (`model.core_passes`).

    state <- net(state, e)    `num` times

A rule that unrolls its loop reads the state after each step, so its depth is the number of steps. A denoiser runs the
core once per network evaluation: with several passes each evaluation is itself a loop through the same weights, which
training back-propagates through, and can draw conclusions that need more than the layers of one pass.
"""

from typing import Any

from torch import Tensor, nn

from looped.nn.checks import whole_number


class Passes(nn.Module):
    """A block that runs `net` `num` times, each time on the state before and the same e and conditioning.

    Each pass has its own part of a cache in `rows`; clean keys and values that noisy rows attend to (a context) are the
    same in all. Raises `UserError` for fewer than one pass.
    """

    def __init__(self, net: nn.Module, num: int):
        super().__init__()
        whole_number("num", num, 1)
        self.net = net
        self.num = num

    @property
    def num_states(self) -> int:
        """States that a state of the net consists of."""
        return getattr(self.net, "num_states", 1)

    @property
    def keeps_mask(self) -> bool:
        """True if the net need not be tested for it (`LayerStack.keeps_mask`)."""
        return getattr(self.net, "keeps_mask", False)

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of the net."""
        return self.net.layers

    @property
    def norm(self) -> nn.Module:
        """The norm that ends each pass."""
        return self.net.norm

    def forward(self, state: Tensor, e: Tensor, cond: Tensor | None = None, *rows: Any) -> Tensor:
        for number in range(self.num):
            state = self.net(state, e, cond, *(each.in_pass(number) for each in rows))
        return state
