"""Sampling schedules: `num_steps` noise levels from sigma_max down to sigma_min, then 0.

The network is evaluated at all entries but the last; the 0 means that the last estimate is returned unchanged.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from looped.diffusion.noise import LogUniform, Noise
from looped.errors import UserError, did_you_mean
from looped.nn.checks import require, whole_number
from looped.tensor_types import Float64


def schedule(name: str, num_steps: int, noise: Noise | tuple[float, float],
             rho: float = 7.0) -> Float64[Tensor, "{num_steps}+1"]:
    """Descending levels on the CPU, ending in 0; with one step the only evaluation is at sigma_max.

    - `karras`: evenly spaced in `sigma^(1/rho)` (Karras et al. 2022, equation 5; the only one that uses `rho`).
    - `log-linear`: evenly spaced in ln sigma.
    - `quantile`: equal mass of the continuous part of the training distribution between neighbours.

    noise: the training distribution, or the range (sigma_min, sigma_max) alone. Raises `UserError` for an unknown name,
    an invalid range, and `quantile` without a distribution.
    """
    if name not in SCHEDULES:
        raise UserError(f"unknown noise schedule '{name}'{did_you_mean(name, SCHEDULES)}")
    num_steps = whole_number("num_steps", num_steps, 1)
    noise = _distribution(name, noise)
    if rho <= 0:
        raise UserError(f"rho {rho} is not positive; Karras et al. use 7")
    down = torch.linspace(1, 0, num_steps, dtype=torch.float64)
    levels = SCHEDULES[name](down, noise, rho)
    levels[0] = noise.sigma_max  # powers and logarithms may miss the ends by one unit
    if num_steps > 1:
        levels[-1] = noise.sigma_min
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def _distribution(name: str, noise: Noise | tuple[float, float]) -> Noise:
    """The training distribution; for a plain range, the log-uniform one over it. Raises UserError."""
    if isinstance(noise, tuple | list) and len(noise) == 2:
        if name == "quantile":
            raise UserError("the schedule 'quantile' needs the training distribution, not its range alone; pass "
                            "LogUniform(sigma_min, sigma_max), another of looped.diffusion.noise, or objective.noise")
        return LogUniform(*noise)
    require(noise, Noise, "noise", "pass the range (sigma_min, sigma_max), a distribution of looped.diffusion.noise, "
                                   "or objective.noise")
    return noise


def block_schedule(name: str, num_steps: int, noise: Noise, block: int,
                   order: str) -> Float64[Tensor, "{num_steps} {block}"]:
    """The level of each row of a block at each network evaluation.

    `together`: all rows follow `schedule`. `left-to-right`: the rows form as many groups as there are steps, at most
    one per row. A group waits at sigma_max, follows a schedule over its part of the steps, and stays at sigma_min while
    later groups follow theirs.
    """
    if order == "together":
        return schedule(name, num_steps, noise)[:-1, None].expand(-1, block)
    groups = min(num_steps, block)
    levels = torch.empty(num_steps, groups, dtype=torch.float64)
    for group in range(groups):
        start, stop = (place * num_steps // groups for place in (group, group + 1))
        levels[:start, group], levels[stop:, group] = noise.sigma_max, noise.sigma_min
        levels[start:stop, group] = schedule(name, stop - start, noise)[:-1]
    return levels[:, torch.arange(block) * groups // block]


def karras(down: Tensor, noise: Noise, rho: float) -> Tensor:
    low, high = noise.sigma_min ** (1 / rho), noise.sigma_max ** (1 / rho)
    return (low + down * (high - low)) ** rho


def quantile(down: Tensor, noise: Noise, rho: float) -> Tensor:
    return noise.continuous.quantile(down)


def log_linear(down: Tensor, noise: Noise, rho: float) -> Tensor:
    return LogUniform(noise.sigma_min, noise.sigma_max).quantile(down)


# name -> levels at `down`, evenly spaced from 1 (sigma_max) down to 0 (sigma_min)
SCHEDULES: dict[str, Callable[[Tensor, Noise, float], Tensor]] = {
    "karras": karras, "quantile": quantile, "log-linear": log_linear,
}
