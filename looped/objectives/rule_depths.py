"""Loop steps of a training step under the rules `progressive` and `fixed-point`, and their expected cost."""

import math
from typing import Any

import torch

from looped.config.recurrence import FixedPointConfig, RecurrenceConfig
from looped.rng import StepRandom


def sample_progressive_depths(most: int, random: StepRandom) -> tuple[int, int]:
    """(n, k), one pair for every row and process: n ~ U{0 ... most - 1}, k ~ U{1 ... most - n} (Bansal et al. 2022,
    `training.py` of aks2203/deep-thinking)."""
    gen = random.lockstep("progressive")
    n = int(torch.randint(0, most, (), generator=gen))
    return n, int(torch.randint(1, most - n + 1, (), generator=gen))


def progressive_shares(config: RecurrenceConfig) -> dict[str, float]:
    """The non-zero weights of the losses that `progressive` adds up."""
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
    """`Objective.decisions` for a depth (n, k) with these means: whole depths whose weighted mean is the given one."""
    n, k = math.floor(no_grad), math.floor(grad)
    more, deeper = no_grad - n, grad - k
    corners = [(1 - more - deeper, (n, k)), (more, (n + 1, k)), (deeper, (n, k + 1))]
    return [(weight, {"depth": depths}) for weight, depths in corners if weight]


def fixed_point_steps(config: FixedPointConfig) -> tuple[float, float]:
    """Applications of the core per training step: (by the solver, without gradient, at most; with gradient)."""
    return float(config.max_steps), float(config.phantom_steps if config.gradient == "phantom" else 1)


def implicit_steps(config: FixedPointConfig) -> float:
    """Upper bound on the cost that the implicit gradient adds to backward, in forward passes of the core: one rebuilds
    its graph, then a product with the transposed Jacobian per solver step."""
    return 1.0 + config.max_steps if config.gradient == "implicit" else 0.0
