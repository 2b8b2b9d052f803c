"""Masked diffusion: tokens are hidden one by one instead of blurred (MD4, Shi et al. 2024, arXiv 2406.04329).

At time t in [0, 1] a token is still seen with probability alpha(t), which falls from 1 to 0; m = 1 - alpha is the level
of noise. The bound on -ln p(x) is

    E over t of  w(t) * sum over hidden tokens of -ln p(token | what is seen),    w = -alpha'(t) / (1 - alpha(t))

which in terms of m is the integral from 0 to 1 of (1/m) E[...] dm: no schedule changes it, only how often each level is
drawn. Blocks share the levels by equal decrements of alpha (DiffusionBlocks, arXiv 2506.14202): block 0 owns the
highest ones, where most is hidden.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from looped.config.blocks import BlocksConfig
from looped.diffusion.bridge import draw
from looped.errors import UserError, did_you_mean
from looped.shapes import Bool, Float, Float64, Int

Time = Float64[Tensor, "*shape"]
Tokens = Int[Tensor, "batch length"]


def _cosine(t: Time) -> Time:
    return 1 - torch.cos(math.pi / 2 * (1 - t))


SCHEDULES: dict[str, Callable[[Time], Time]] = {"linear": lambda t: 1 - t, "cosine": _cosine}
"""Name -> alpha(t)."""


def level(name: str, t: Time) -> Time:
    """m(t), the probability that a token is hidden: 0 at t = 0 and 1 at t = 1. Raises UserError for an unknown
    schedule."""
    if name not in SCHEDULES:
        raise UserError(f"masking schedule '{name}' is unknown{did_you_mean(name, SCHEDULES)}")
    return 1 - SCHEDULES[name](t)


def weight(name: str, t: Time) -> Time:
    """w(t) = m'(t) / m(t), by automatic differentiation of the schedule."""
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        m = level(name, t)
        (slope,) = torch.autograd.grad(m.sum(), t)
    return slope / m.detach()


def time_of(name: str, m: Time) -> Time:
    """The inverse of `level`."""
    return m if name == "linear" else 1 - 2 / math.pi * torch.acos(m.clamp(0, 1))


def mask_edges(num_blocks: int) -> Float64[Tensor, "{num_blocks}+1"]:
    """Levels m between neighbouring blocks, falling from 1 to 0 in equal decrements of alpha; `noise.block_of` says
    which block owns a level."""
    if num_blocks < 1:
        raise UserError(f"num_blocks {num_blocks} is below 1; a partition needs at least one block")
    return torch.linspace(1, 0, num_blocks + 1, dtype=torch.float64)


def mask_interval(block: int, edges: Float64[Tensor, "edges"], overlap: float) -> tuple[float, float]:
    """Lowest and highest level that a block trains on: its own, and `overlap` of its width of each neighbour's."""
    high, low = edges[block].item(), edges[block + 1].item()
    more = overlap * (high - low)
    return max(low - more, 0.0), min(high + more, 1.0)


def block_times(name: str, num_blocks: int) -> Float64[Tensor, "{num_blocks}"]:
    """The share of the times t that falls to each block."""
    return -time_of(name, mask_edges(num_blocks)).diff()


def block_shares(config: BlocksConfig, name: str) -> Float64[Tensor, "blocks"]:
    """The share of the steps that train each block (`blocks.choose`)."""
    if config.choose == "mass":
        return block_times(name, config.num)
    return torch.full((config.num,), 1 / config.num, dtype=torch.float64)


def hide(tokens: Tokens, m: Float[Tensor, "batch"], uniform: Float[Tensor, "batch length"],
         mask_token: int) -> tuple[Tokens, Bool[Tensor, "batch length"]]:
    """(tokens with each hidden with probability m of its sequence, which are)."""
    hidden = (uniform < m.unsqueeze(1)).to(tokens.device)
    return tokens.masked_fill(hidden, mask_token), hidden


def hide_one_and(tokens: Tokens, m: Float[Tensor, "batch"], uniform: Float[Tensor, "batch length+1"],
                 mask_token: int) -> tuple[Tokens, Bool[Tensor, "batch length"]]:
    """The same, but one token of each sequence, any with equal chance, is hidden for certain.

    This draws each set of hidden tokens by its probability under `hide` times its size / (m length), so the mean over
    the hidden tokens has the expectation of 1 / (m length) times the sum under `hide`: the bound without its weights,
    and nearly without their variance. What every token costs alike comes out exactly.
    """
    length = tokens.shape[1]
    one = (uniform[:, length:] * length).long()
    hidden = (uniform[:, :length] < m.unsqueeze(1)).scatter(1, one, True).to(tokens.device)
    return tokens.masked_fill(hidden, mask_token), hidden


Predict = Callable[[Tokens, float], Float[Tensor, "batch length vocab"]]
"""(tokens with hidden ones, their level m) -> logits of all tokens."""


def unmask(predict: Predict, tokens: Tokens, hidden: Bool[Tensor, "batch length"], levels: Float64[Tensor, "steps"], *,
           uniform: Callable[[str, int], Float64[Tensor, "batch length"]]) -> Tokens:
    """Fill in what is hidden along falling `levels` of m that end in 0: from m to m' each hidden token is drawn from
    the prediction with probability (m - m') / m, and stays (MD4, section 4, algorithm 2).

    uniform: draws in [0, 1) for a stream, "reveal" or "token", and a step. Raises UserError for levels that do not fall
    to 0.
    """
    steps = [float(m) for m in levels]
    if len(steps) < 2 or steps[-1] != 0 or not all(a > b for a, b in pairwise(steps)):
        raise UserError(f"levels {steps} must fall and end in 0; take for instance 1 - i / n for i = 0 ... n")
    for step, (m, lower) in enumerate(pairwise(steps)):
        shown = hidden & (uniform("reveal", step) < (m - lower) / m).to(hidden.device)
        if bool(shown.any()):
            drawn = draw(predict(tokens, m).float().softmax(-1), uniform("token", step))
            tokens = torch.where(shown, drawn, tokens)
        hidden = hidden & ~shown
    return tokens
