"""Depths of a training step: its loop steps, and those of them that carry gradient.

Huginn's sampler (seal-rg/recurrent-pretraining, "poisson-lognormal-filling"): a rate from a log-normal whose mean is
the mean recurrence, p = Poisson(rate) + 1 steps, the last k = min(p, backprop) of them with gradient.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from looped.config.recurrence import FixedPointConfig, RecurrenceConfig
from looped.rng import StepRandom

SIGMA = 0.5
"""Standard deviation of the log-normal rate (Huginn)."""


def huginn_depths(mean: int, backprop: int, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """(n, k) for each generator: steps without and with gradient. E[n + k] = mean + 1."""
    tau = math.log(mean) - SIGMA**2 / 2
    rates = torch.stack([torch.randn((), generator=gen, dtype=torch.float64) for gen in generators])
    rates = torch.exp(tau + SIGMA * rates)
    draws = [torch.poisson(rate, generator=gen) for rate, gen in zip(rates, generators, strict=True)]
    p = torch.stack(draws).long() + 1
    k = p.clamp(max=backprop)
    return p - k, k


def sample_depths(config: RecurrenceConfig, random: StepRandom) -> tuple[int | Int[Tensor, "batch"], ...]:
    """(n, k) of a training step: tensors (B,) under `per_sequence`, else one pair for every row and process."""
    k = min(config.mean, config.backprop)
    if config.distribution == "fixed":
        return config.mean - k, k
    if config.per_sequence:
        return huginn_depths(config.mean, config.backprop, random.per_row("depth"))
    n, k = huginn_depths(config.mean, config.backprop, [random.lockstep("depth")])
    return int(n), int(k)


def expected_depths(config: RecurrenceConfig) -> tuple[float, float]:
    """(E[n], E[k]) in closed form up to a quadrature over the rate."""
    if config.distribution == "fixed":
        k = min(config.mean, config.backprop)
        return float(config.mean - k), float(k)
    # E[min(p, s)] = sum over j = 1 ... s of P(p >= j), and p - 1 is Poisson given the rate: average over its quantiles.
    rate = _rates(config.mean)
    counts = torch.arange(config.backprop, dtype=torch.float64).unsqueeze(1)
    log_pmf = counts * rate.log() - rate - torch.lgamma(counts + 1)
    below = torch.cat([torch.zeros(1, dtype=torch.float64), log_pmf.exp().mean(1).cumsum(0)])[: config.backprop]
    k = float((1 - below).sum())
    return config.mean + 1 - k, k


def sample_progressive_depths(most: int, random: StepRandom) -> tuple[int, int]:
    """(n, k), one pair for every row and process: n ~ U{0 ... most - 1}, k ~ U{1 ... most - n} (Bansal et al. 2022,
    `training.py` of aks2203/deep-thinking)."""
    gen = random.lockstep("progressive")
    n = int(torch.randint(0, most, (), generator=gen))
    return n, int(torch.randint(1, most - n + 1, (), generator=gen))


def progressive_shares(config: RecurrenceConfig) -> dict[str, float]:
    """The weights of the losses that `progressive` adds up, of those that have any."""
    shares = {"progressive": config.progressive_weight, "full": 1 - config.progressive_weight}
    return {part: share for part, share in shares.items() if share > 0}


def mean_progressive_depths(most: int) -> tuple[float, float]:
    """(E[n], E[k]) of `sample_progressive_depths`."""
    return (most - 1) / 2, (most + 3) / 4


def expected_progressive_depths(config: RecurrenceConfig) -> tuple[float, float]:
    """Mean loop steps (without gradient, with it) of a training step, in all its unrolls."""
    most, parts = config.mean, progressive_shares(config)
    no_grad, grad = mean_progressive_depths(most) if "progressive" in parts else (0.0, 0.0)
    return no_grad, grad + most * ("full" in parts)


def depth_decisions(no_grad: float, grad: float) -> list[tuple[float, dict[str, Any]]]:
    """`Objective.decisions` of a depth (n, k) with these means: whole depths whose weighted means they are."""
    n, k = math.floor(no_grad), math.floor(grad)
    more, deeper = no_grad - n, grad - k
    corners = [(1 - more - deeper, (n, k)), (more, (n + 1, k)), (deeper, (n, k + 1))]
    return [(weight, {"depth": depths}) for weight, depths in corners if weight]


def fixed_point_steps(config: FixedPointConfig) -> tuple[float, float]:
    """Applications of the core in a training step: by the solver, which has no gradient, at most; and with gradient."""
    return float(config.max_steps), float(config.phantom_steps if config.gradient == "phantom" else 1)


def implicit_steps(config: FixedPointConfig) -> float:
    """What the implicit gradient adds to backward at most, in forward passes of the core: one to build its graph again,
    then a product with the transposed Jacobian for each step of the solve."""
    return 1.0 + config.max_steps if config.gradient == "implicit" else 0.0


def huginn_quantiles(mean: int, levels: Sequence[float]) -> list[int]:
    """The smallest depths p with P(depth <= p) >= level, by quadrature over the rate."""
    rate = _rates(mean)
    quantiles, depth, below = [], 0, 0.0
    for level in sorted(levels):
        while below < level:
            depth += 1  # depth - 1 is Poisson given the rate: P(depth <= p) = Q(p, rate), the upper gamma ratio
            below = torch.special.gammaincc(torch.tensor(float(depth), dtype=torch.float64), rate).mean().item()
        quantiles.append(depth)
    return quantiles


def _rates(mean: int) -> Tensor:
    """20,000 equally likely values of the log-normal rate."""
    quantiles = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    return torch.exp(math.log(mean) - SIGMA**2 / 2 + SIGMA * torch.special.ndtri(quantiles))
