"""Second readings of an answer by a denoiser, which judge how probable it is.

An answer is given to the denoiser again, and a reading judges some of its cells from the others, at levels that
training shows:

    order confidence    the cells in random parts; a part is pure noise at sigma_max, the others are held at sigma_min,
                        so every cell is judged once, from the cells of the other parts (its pseudo-likelihood)
    other orders        all cells, noised afresh at the geometric mean of sigma_min and sigma_max
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from looped.config.denoise import DenoiseConfig
from looped.diffusion.noise import Noise
from looped.tensor_types import Bool, Float, Float64


class Reading(NamedTuple):
    """level: noise level of the answer, one for all rows or one per row (B, L). judged: mask of the rows whose
    probability counts (B, L)."""

    level: float | Float64[Tensor, "batch length"]
    judged: Bool[Tensor, "batch length"]


def second_readings(config: DenoiseConfig, noise: Noise, sought: Bool[Tensor, "batch length"], num: int,
                    draws: Callable[[], Float[Tensor, "batch length"]]) -> Iterator[Reading]:
    """`num` readings of an answer in the rows `sought`. draws: random numbers, which divide the cells into parts."""
    if config.order != "confidence":
        yield from [Reading(check_level(noise), sought)] * num
        return
    place = draws().masked_fill(~sought, math.inf).argsort(1).argsort(1)  # a random order of the cells to predict
    for part in range(num):
        judged = sought & (place % num == part)
        yield Reading(torch.where(judged, noise.sigma_max, noise.sigma_min).cpu().double(), judged)


def check_level(noise: Noise) -> float:
    """The level at which a whole answer is read again: the geometric mean of both ends."""
    return (noise.sigma_min * noise.sigma_max) ** 0.5
