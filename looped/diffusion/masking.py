"""Masked diffusion: noise hides whole tokens (MD4, Shi et al. 2024, arXiv 2406.04329).

At time t in [0, 1] a token is visible with probability alpha(t), which falls from 1 to 0; m = 1 - alpha is the noise
level. The bound (NELBO) on -ln p(x) is

    E over t of  w(t) * sum over hidden tokens of -ln p(token | visible tokens),    w = -alpha'(t) / (1 - alpha(t))

In terms of m it is the integral from 0 to 1 of (1/m) E[...] dm: a schedule changes only how often each level is drawn,
not the bound. Several blocks divide the levels by equal decrements of alpha (DiffusionBlocks, arXiv 2506.14202); block
0 owns the highest levels, at which most tokens are hidden.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from looped.config.blocks import BlocksConfig
from looped.devices import to_device
from looped.diffusion.clean_estimate import draw
from looped.errors import UserError, did_you_mean
from looped.tensor_types import Bool, Float, Float64, Int

Time = Float64[Tensor, "*shape"]
Tokens = Int[Tensor, "batch length"]


@dataclass(frozen=True)
class Schedule:
    """A masking schedule: alpha(t), the slope m'(t) of m = 1 - alpha, and the time t(m) of a level."""

    alpha: Callable[[Time], Time]
    slope: Callable[[Time], Time]
    time: Callable[[Time], Time]


SCHEDULES: dict[str, Schedule] = {
    "linear": Schedule(lambda t: 1 - t, torch.ones_like, lambda m: m),
    "cosine": Schedule(lambda t: 1 - torch.cos(math.pi / 2 * (1 - t)),
                       lambda t: math.pi / 2 * torch.sin(math.pi / 2 * (1 - t)),
                       lambda m: 1 - 2 / math.pi * torch.acos(m.clamp(0, 1)))}


def schedule_named(name: str) -> Schedule:
    """Raises UserError for an unknown schedule."""
    if name not in SCHEDULES:
        raise UserError(f"masking schedule '{name}' is unknown{did_you_mean(name, SCHEDULES)}")
    return SCHEDULES[name]


def level(name: str, t: Time) -> Time:
    """m(t), the probability that a token is hidden: 0 at t = 0 and 1 at t = 1."""
    return 1 - schedule_named(name).alpha(t)


def weight(name: str, t: Time) -> Time:
    """w(t) = m'(t) / m(t)."""
    return schedule_named(name).slope(t) / level(name, t)


def time_of(name: str, m: Time) -> Time:
    """The inverse of `level`."""
    return schedule_named(name).time(m)


def mask_edges(num_blocks: int) -> Float64[Tensor, "{num_blocks}+1"]:
    """The edges m of the blocks, descending from 1 to 0 in equal decrements of alpha; `noise.block_of` gives the block
    that owns a level."""
    if num_blocks < 1:
        raise UserError(f"num_blocks {num_blocks} is below 1; a partition needs at least one block")
    return torch.linspace(1, 0, num_blocks + 1, dtype=torch.float64)


def mask_interval(block: int, edges: Float64[Tensor, "edges"], overlap: float) -> tuple[float, float]:
    """(lowest, highest) level a block trains on: its interval, extended at both ends by `overlap` times its width."""
    high, low = edges[block].item(), edges[block + 1].item()
    more = overlap * (high - low)
    return max(low - more, 0.0), min(high + more, 1.0)


def block_times(name: str, num_blocks: int) -> Float64[Tensor, "{num_blocks}"]:
    """The fraction of the times t that belongs to each block."""
    return -time_of(name, mask_edges(num_blocks)).diff()


def block_shares(config: BlocksConfig, name: str) -> Float64[Tensor, "blocks"]:
    """The fraction of training steps that train each block (`blocks.choose`)."""
    if config.choose == "mass":
        return block_times(name, config.num)
    return torch.full((config.num,), 1 / config.num, dtype=torch.float64)


def hide(tokens: Tokens, m: Float[Tensor, "batch"], uniform: Float[Tensor, "batch length"],
         mask_token: int) -> tuple[Tokens, Bool[Tensor, "batch length"]]:
    """Hides each token with its sequence's probability m; returns (tokens, mask of the hidden ones)."""
    hidden = to_device(uniform < m.unsqueeze(1), tokens.device)
    return tokens.masked_fill(hidden, mask_token), hidden


def hide_one_and(tokens: Tokens, m: Float[Tensor, "batch"], uniform: Float[Tensor, "batch length+1"],
                 mask_token: int) -> tuple[Tokens, Bool[Tensor, "batch length"]]:
    """`hide`, but one token of each sequence, drawn uniformly, is always hidden.

    This draws each set of hidden tokens with its probability under `hide` times its size / (m length), so the mean over
    the hidden tokens has the expectation of 1 / (m length) times the sum under `hide`: the bound without its weights,
    and nearly without their variance. If all tokens have the same loss, the estimate is exact.
    """
    length = tokens.shape[1]
    one = (uniform[:, length:] * length).long()
    hidden = to_device((uniform[:, :length] < m.unsqueeze(1)).scatter(1, one, True), tokens.device)
    return tokens.masked_fill(hidden, mask_token), hidden


Predict = Callable[[Tokens, float], Float[Tensor, "batch length vocab"]]
"""(partly hidden tokens, their level m) -> logits of all tokens."""


def unmask(predict: Predict, tokens: Tokens, hidden: Bool[Tensor, "batch length"], levels: Float64[Tensor, "steps"], *,
           uniform: Callable[[str, int], Float64[Tensor, "batch length"]]) -> Tokens:
    """Sample the hidden tokens along descending `levels` of m that end in 0 (MD4, section 4, algorithm 2).

    From m to m' each hidden token is drawn from the prediction with probability (m - m') / m; once drawn, it is fixed.
    uniform: draws in [0, 1) for a stream, "reveal" or "token", and a step. Raises UserError for levels that do not
    descend to 0.
    """
    steps = [float(m) for m in levels]
    if len(steps) < 2 or steps[-1] != 0 or not all(a > b for a, b in pairwise(steps)):
        raise UserError(f"levels must descend and end in 0; the {len(steps)} given do not; use for example 1 - i / n "
                        f"for i = 0 ... n")
    hidden = hidden.cpu()  # where the draws are, so the host knows if a step reveals anything
    for step, (m, lower) in enumerate(pairwise(steps)):
        shown = hidden & (uniform("reveal", step) < (m - lower) / m)
        if bool(shown.any()):
            drawn = draw(predict(tokens, m).float().softmax(-1), uniform("token", step))
            tokens = torch.where(to_device(shown, tokens.device), drawn, tokens)
        hidden = hidden & ~shown
    return tokens
