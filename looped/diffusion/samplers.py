"""Solvers from pure noise to a clean estimate: pure functions of a denoiser and a falling schedule of noise levels.

Every solver has one signature, `sample(denoise, z, sigmas, *, callback=None, random=None)`:

- `denoise(z, sigma) -> D`, the clean estimate at the level `sigma` (a float);
- `sigmas`: n levels and a final 0 (`schedule` makes them); the network is read at all but the 0;
- `callback(step, sigma, z, D)` sees every step and stops the solver by returning True;
- `random(step)`: standard normal draws of z's shape, for the solvers that add noise.

They return the last D. Euler's step is `z + (sigma' - sigma) (z - D) / sigma` (Karras et al. 2022, algorithm 1).
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor

from looped.diffusion.edm import ode_derivative
from looped.errors import UserError

Denoise = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, float, Tensor, Tensor], Any]
Random = Callable[[int], Tensor]


def _levels(sigmas: Tensor) -> list[float]:
    levels = [float(sigma) for sigma in sigmas]
    if len(levels) < 2 or levels[-1] != 0 or any(a <= b for a, b in pairwise(levels)):
        raise UserError(f"sigmas {levels} must fall and end in 0; use looped.diffusion.schedules.schedule")
    return levels


def _stop(callback: Callback | None, step: int, sigma: float, z: Tensor, D: Tensor) -> bool:
    return callback is not None and bool(callback(step, sigma, z, D))


def _noise(random: Random | None, step: int, solver: str) -> Tensor:
    if random is None:
        raise UserError(f"the {solver} solver adds noise; pass random=, a function from the step to normal draws")
    return random(step)


def sample_euler(denoise: Denoise, z: Tensor, sigmas: Tensor, *, callback: Callback | None = None,
                 random: Random | None = None) -> Tensor:
    """First order, deterministic; n evaluations."""
    levels = _levels(sigmas)
    D = z
    for step, (sigma, lower) in enumerate(pairwise(levels)):
        D = denoise(z, sigma)
        if _stop(callback, step, sigma, z, D):
            break
        z = z + (lower - sigma) * ode_derivative(z, D, sigma)
    return D


def sample_heun(denoise: Denoise, z: Tensor, sigmas: Tensor, *, callback: Callback | None = None,
                random: Random | None = None) -> Tensor:
    """Second order, deterministic; 2n - 1 evaluations: the last step, down to 0, is Euler's."""
    levels = _levels(sigmas)
    D = z
    for step, (sigma, lower) in enumerate(pairwise(levels)):
        D = denoise(z, sigma)
        if _stop(callback, step, sigma, z, D):
            break
        slope = ode_derivative(z, D, sigma)
        ahead = z + (lower - sigma) * slope
        if lower > 0:
            slope = (slope + ode_derivative(ahead, denoise(ahead, lower), lower)) / 2
        z = z + (lower - sigma) * slope
    return D


def sample_dpmpp_2m(denoise: Denoise, z: Tensor, sigmas: Tensor, *, callback: Callback | None = None,
                    random: Random | None = None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order from two consecutive estimates; n evaluations."""
    levels = _levels(sigmas)
    D, before = z, None
    for step, (sigma, lower) in enumerate(pairwise(levels)):
        D = denoise(z, sigma)
        if _stop(callback, step, sigma, z, D) or lower == 0:
            break
        h = math.log(sigma / lower)  # step in lambda = -ln sigma
        mixed = D
        if before is not None:
            ratio = math.log(levels[step - 1] / sigma) / h
            mixed = D + (D - before) / (2 * ratio)
        z = (lower / sigma) * z - math.expm1(-h) * mixed
        before = D
    return D


def sample_ancestral(denoise: Denoise, z: Tensor, sigmas: Tensor, *, callback: Callback | None = None,
                     random: Random | None = None) -> Tensor:
    """Euler down past the next level, then noise up to it: z' ~ N(D + (z - D) sigma'^2 / sigma^2, ...), the exact
    posterior of the noising process given D (DDPM's step in EDM's letters); n evaluations."""
    levels = _levels(sigmas)
    D = z
    for step, (sigma, lower) in enumerate(pairwise(levels)):
        D = denoise(z, sigma)
        if _stop(callback, step, sigma, z, D):
            break
        if lower == 0:
            z = D
        else:
            up = lower * math.sqrt(1 - lower**2 / sigma**2)
            down = lower**2 / sigma
            z = z + (down - sigma) * ode_derivative(z, D, sigma) + up * _noise(random, step, "ancestral")
    return D


def sample_restart(denoise: Denoise, z: Tensor, sigmas: Tensor, *, callback: Callback | None = None,
                   random: Random | None = None) -> Tensor:
    """Restarts at one level: read the first level once, then noise the estimate afresh to the geometric middle of the
    schedule and read it there, again and again; n evaluations."""
    levels = _levels(sigmas)[:-1]
    level = math.sqrt(levels[0] * levels[-1])
    D = z
    for step in range(len(levels)):
        sigma = levels[0] if step == 0 else level
        if step > 0:
            z = D + level * _noise(random, step, "restart")
        D = denoise(z, sigma)
        if _stop(callback, step, sigma, z, D):
            break
    return D


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": sample_euler, "heun": sample_heun, "dpmpp-2m": sample_dpmpp_2m, "ancestral": sample_ancestral,
    "restart": sample_restart,
}
"""Name -> solver; add your own under a new name."""
