"""Diffusion solvers, from pure noise to a clean estimate: pure functions of a denoiser and descending noise levels.

Every solver has one signature, `sample(denoise, z, sigmas, *, callback=None, random=None)`:

- `denoise(z, sigma) -> D`, the clean estimate at the level `sigma` (a float);
- `sigmas`: n levels and a final 0 (from `schedule`); the network is evaluated at all but the 0;
- `callback(step, sigma, z, D)` is called at every step and stops the solver by returning True;
- `random`: standard normal draws of z's shape for the solvers that add noise, a function of the step or a
  `torch.Generator`.

Solvers return the last D; states are at least float32. Euler's step is `z + (sigma' - sigma) (z - D) / sigma` (Karras
et al. 2022, algorithm 1).
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from looped.devices import to_like, widest
from looped.diffusion.edm import align, ode_derivative
from looped.errors import UserError
from looped.import_path import class_at
from looped.nn.checks import kind_of

Denoise = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, float, Tensor, Tensor], Any]
Random = Callable[[int], Tensor] | torch.Generator


def _wide(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _levels(sigmas: Tensor) -> list[float]:
    fix = "use looped.diffusion.schedules.schedule"
    levels = [float(sigma) for sigma in sigmas]
    if len(levels) < 2 or levels[-1] != 0 or levels[0] == math.inf:
        shown = f"run from {levels[0]:g} to {levels[-1]:g}" if levels else "are empty"
        raise UserError(f"sigmas must run from a finite level down to 0; these {shown}; {fix}")
    for place, (upper, lower) in enumerate(pairwise(levels)):
        if not upper > lower:  # or nan
            raise UserError(f"sigmas must descend; sigmas[{place + 1}] {lower:g} is not below {upper:g}; {fix}")
    return levels


def _read(denoise: Denoise, z: Tensor, sigma: float) -> Tensor:
    """D in z's dtype. Raises UserError if its shape is not that of z, since it would be broadcast."""
    D = denoise(z, sigma)
    if not isinstance(D, Tensor) or D.shape != z.shape:
        raise UserError(f"denoise must return an estimate of z's shape {tuple(z.shape)}, got {kind_of(D)}; a Denoiser "
                        f"returns logits; its estimate(logits) converts them")
    return D.to(z.dtype)


def _stop(callback: Callback | None, step: int, sigma: float, z: Tensor, D: Tensor) -> bool:
    return callback is not None and bool(callback(step, sigma, z, D))


def _noise(random: Random | None, step: int, solver: str, z: Tensor) -> Tensor:
    if random is None:
        raise UserError(f"the {solver} solver adds noise; pass random=, a torch.Generator or a function "
                        f"from the step to normal draws")
    if isinstance(random, torch.Generator):
        return torch.randn(z.shape, generator=random, dtype=z.dtype, device=random.device).to(z.device)
    return to_like(random(step), z)


def sample_euler(denoise: Denoise, z: Tensor, sigmas: Tensor, *, callback: Callback | None = None,
                 random: Random | None = None) -> Tensor:
    """Euler's method: first order, deterministic; n evaluations."""
    z, levels = _wide(z), _levels(sigmas)
    D = z
    for step, (sigma, lower) in enumerate(pairwise(levels)):
        D = _read(denoise, z, sigma)
        if _stop(callback, step, sigma, z, D):
            break
        z = z + (lower - sigma) * ode_derivative(z, D, sigma)
    return D


def sample_heun(denoise: Denoise, z: Tensor, sigmas: Tensor, *, callback: Callback | None = None,
                random: Random | None = None) -> Tensor:
    """Heun's method: second order, deterministic; 2n - 1 evaluations, as the last step, down to 0, is an Euler step."""
    z, levels = _wide(z), _levels(sigmas)
    D = z
    for step, (sigma, lower) in enumerate(pairwise(levels)):
        D = _read(denoise, z, sigma)
        if _stop(callback, step, sigma, z, D):
            break
        slope = ode_derivative(z, D, sigma)
        ahead = z + (lower - sigma) * slope
        if lower > 0:
            slope = (slope + ode_derivative(ahead, _read(denoise, ahead, lower), lower)) / 2
        z = z + (lower - sigma) * slope
    return D


def sample_dpmpp_2m(denoise: Denoise, z: Tensor, sigmas: Tensor, *, callback: Callback | None = None,
                    random: Random | None = None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order from two consecutive estimates; n evaluations."""
    z, levels = _wide(z), _levels(sigmas)
    D, before = z, None
    for step, (sigma, lower) in enumerate(pairwise(levels)):
        D = _read(denoise, z, sigma)
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
                     random: Random | None = None, eta: float = 1.0) -> Tensor:
    """Ancestral sampling: an Euler step to below the next level, then noise up to it; n evaluations.

    z' ~ N(D + (z - D) sigma'^2 / sigma^2, ...), the exact posterior of the noising process given D (DDPM's step in
    EDM's notation). `eta` scales the noise: 0 is Euler.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta {eta} is not in [0, 1]; 1 is the full posterior noise, 0 is Euler")
    z, levels = _wide(z), _levels(sigmas)
    D = z
    for step, (sigma, lower) in enumerate(pairwise(levels)):
        D = _read(denoise, z, sigma)
        if _stop(callback, step, sigma, z, D):
            break
        if lower == 0:
            z = D
        else:
            up = eta * lower * math.sqrt(1 - lower**2 / sigma**2)
            down = math.sqrt(lower**2 - up**2)
            z = z + (down - sigma) * ode_derivative(z, D, sigma)
            if up > 0:
                z = z + up * _noise(random, step, "ancestral", z)
    return D


def ancestral_step(z: Tensor, D: Tensor, sigma: Tensor, lower: Tensor, noise: Tensor) -> Tensor:
    """One step of `sample_ancestral` from `sigma` to `lower`, with levels per sequence (B,) or per row (B, L). If both
    are equal, z is unchanged."""
    return _bridged(z, D, to_like(align((lower / sigma).square(), z), z), to_like(align(lower, z), z), noise)


def _bridged(z: Tensor, D: Tensor, keep: Tensor, lower: Tensor, noise: Tensor) -> Tensor:
    """z moved towards D, of which the part `keep` stays, with noise up to the level `lower`."""
    return keep * z + (1 - keep) * D + lower * (1 - keep).sqrt() * noise


def sample_rows(denoise: Callable[[Tensor, Tensor], Tensor], z: Tensor, levels: Tensor, *,
                random: Callable[[int], Tensor]) -> Tensor:
    """`sample_ancestral` with a separate schedule per row: `levels` (n, L) are the levels of the n evaluations, and
    `denoise` receives one level per row of z (B, L, d)."""
    z = _wide(z)
    lowers = levels[1:]
    kept = to_like(torch.stack([(lowers / levels[:-1]).square(), lowers], dim=1).unsqueeze(-1), z)  # one copy, n 2 L 1
    for step, (keep, lower) in enumerate(kept):
        D = denoise(z, levels[step]).to(z.dtype)
        z = _bridged(z, D, keep, lower, to_like(random(step), z))
    return denoise(z, levels[-1]).to(z.dtype)


@dataclass(frozen=True)
class Settling:
    """The rule by which cells become fixed. confidence: gives the confidence of the last evaluation in each row (B, L).
    sought: mask of the rows to predict (B, L). above: rows with a confidence above this are also fixed."""

    confidence: Callable[[], Tensor]
    sought: Tensor
    above: float = 1.0


def sample_by_confidence(denoise: Callable[[Tensor, Tensor], Tensor], z: Tensor, levels: tuple[float, float],
                         num_steps: int, settling: Settling, *, random: Callable[[int], Tensor]) -> Tensor:
    """Fix the most confident cells first (MaskGIT, Chang et al. 2022; for puzzles Kim et al. 2025, arXiv 2502.06768).

    After step t of n, a fraction t / n of the cells to predict in each sequence is fixed: held at the denoiser's
    estimate, at the lower of `levels` (low, high). The others stay pure noise at the higher level. Cells above
    `settling.above` are also fixed. n evaluations.

    denoise: (z, level of each row (B, L)) -> D.
    """
    (low, high), sought = levels, settling.sought
    z, settled = _wide(z), ~sought
    for step in range(1, num_steps):
        D = denoise(z, torch.where(settled, low, high).cpu().double()).to(z.dtype)
        sure = settling.confidence().to(widest(z.device)).masked_fill(settled, math.inf).masked_fill(~sought, -math.inf)
        place = sure.argsort(dim=1, descending=True).argsort(dim=1)  # 0 for the most confident
        num = (sought.sum(1, keepdim=True) * step / num_steps).ceil()
        now = ((place < num) | (sure > settling.above)) & sought
        z = torch.where((now & ~settled).unsqueeze(-1), D + low * to_like(random(step), z), z)
        settled = now | ~sought
    return denoise(z, torch.where(settled, low, high).cpu().double()).to(z.dtype)


def sample_restart(denoise: Denoise, z: Tensor, sigmas: Tensor, *, callback: Callback | None = None,
                   random: Random | None = None, level: float | None = None) -> Tensor:
    """Restarts at one level: evaluate the first level once, then repeatedly add fresh noise of `level` to the estimate
    and evaluate there; n evaluations. `level` defaults to the geometric mean of the schedule's ends."""
    z, levels = _wide(z), _levels(sigmas)[:-1]
    if level is not None and not 0 < level <= levels[0]:
        raise UserError(f"restart level {level} is not in (0, {levels[0]}]; use a level that the model was trained at")
    level = math.sqrt(levels[0] * levels[-1]) if level is None else level
    D = z
    for step in range(len(levels)):
        sigma = levels[0] if step == 0 else level
        if step > 0:
            z = D + level * _noise(random, step, "restart", z)
        D = _read(denoise, z, sigma)
        if _stop(callback, step, sigma, z, D):
            break
    return D


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": sample_euler, "heun": sample_heun, "dpmpp-2m": sample_dpmpp_2m, "ancestral": sample_ancestral,
    "restart": sample_restart,
}
"""Name -> solver."""


def sampler_of(name: str) -> Callable[..., Tensor]:
    """The solver with this name, or at this dotted path: a function with the signature above. Raises UserError."""
    if name in SAMPLERS:
        return SAMPLERS[name]
    solver = class_at(name, "denoise.solver")
    try:
        inspect.signature(solver).bind("denoise", "z", "sigmas", random=None)
    except TypeError as error:
        raise UserError(f"denoise.solver {name} cannot be called as a solver ({error}); its arguments are (denoise, z, "
                        f"sigmas, *, callback=None, random=None)") from None
    except ValueError:  # a function without a signature
        pass
    return solver
