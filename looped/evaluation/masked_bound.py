"""What masked diffusion gives a text at most: the bound on its nats a token, by the number of unmasking steps.

From level m to m' < m each hidden token is shown with probability (m - m') / m and drawn from the network, which reads
the text as it is at m. Along m_0 = 1 > ... > m_n = 0 this gives (MD4, Shi et al. 2024, arXiv 2406.04329, section 3)

    -ln p(x) <= sum over i of (m_i - m_i+1) / m_i * E at m_i[sum over the hidden of -ln p(token | seen)]

and with ever more steps the integral that training draws from. Both are estimated as in `Masked.losses_at`: without the
variance of the weights, and exactly where all tokens cost the same.
"""

import itertools
from collections.abc import Iterator

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from looped.devices import now
from looped.diffusion import masking
from looped.objectives.masked import Masked
from looped.rng import StepRandom

Rows = Int[Tensor, "batch length_and_one"]


def step_levels(objective: Masked, num_steps: int) -> Float64[Tensor, "{num_steps}+1"]:
    """Levels that fall from 1 to 0 at times evenly apart."""
    levels = masking.level(objective.config.schedule, torch.linspace(1, 0, num_steps + 1, dtype=torch.float64))
    levels[0], levels[-1] = 1, 0  # a cosine may miss the ends by one unit
    return levels


def step_bounds(objective: Masked, rows: Rows, depths: list[int], random: StepRandom) -> Iterator[tuple]:
    """(number of steps, nats a token of each sequence (B, 1), seconds)."""
    for depth in depths:
        began = now(rows.device)
        losses = step_bound(objective, rows, depth, random)
        yield depth, losses.unsqueeze(1), now(rows.device) - began


def step_bound(objective: Masked, rows: Rows, num_steps: int, random: StepRandom) -> Float64[Tensor, "batch"]:
    """The bound of an unmasking in so many steps, from one draw of what is hidden at each."""
    batch = objective.ask(rows)
    total = torch.zeros(len(rows), dtype=torch.float64)
    for step, (m, lower) in enumerate(itertools.pairwise(step_levels(objective, num_steps).tolist())):
        level = torch.full_like(total, m)
        total += (m - lower) * objective.losses_at(batch, level, random, f"hidden{step}").cpu().double()
    return total


def bound(objective: Masked, rows: Rows, num_levels: int, random: StepRandom) -> Float64[Tensor, "batch"]:
    """The bound of ever more steps: the mean over a level from each of so many equal parts of [0, 1]."""
    batch = objective.ask(rows)
    total = torch.zeros(len(rows), dtype=torch.float64)
    places = random.uniform("level", (num_levels,))
    for part, place in enumerate(places.unbind(1)):
        total += objective.losses_at(batch, (part + place) / num_levels, random, f"hidden{part}").cpu().double()
    return total / num_levels
