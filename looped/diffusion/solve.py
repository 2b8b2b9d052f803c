"""A solve as a config says it: solver, schedule, and the order in which a block of tokens loses its noise."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from looped.config.denoise import DenoiseConfig
from looped.diffusion.noise import Noise
from looped.diffusion.samplers import Settling, sample_by_confidence, sample_rows, sampler_of
from looped.diffusion.schedules import block_schedule, schedule


def solve(config: DenoiseConfig, noise: Noise, denoise: Callable[[Tensor, float | Tensor], Tensor], num_steps: int, *,
          normal: Callable[[str], Tensor], settling: Settling | None = None) -> Tensor:
    """The last estimate (B, L, d) of `num_steps` readings from pure noise; L is a whole number of blocks.

    denoise: (z, level) -> D, where `level` is one for all rows, or (L,) or (B, L) where each has its own. normal:
    standard normal draws of z's shape for a stream, "start" or "step0", "step1", ... settling: what the order
    `confidence` asks.
    """
    z = noise.sigma_max * normal("start")
    z = z if config.start == "noise" else torch.zeros_like(z)

    def draws(step: int) -> Tensor:
        return normal(f"step{step}")

    if config.order == "together":
        own = {"level": config.restart_level} if config.solver == "restart" else {}
        return sampler_of(config.solver)(denoise, z, schedule(config.schedule, num_steps, noise), random=draws, **own)
    if config.order == "confidence":
        return sample_by_confidence(denoise, z, (noise.sigma_min, noise.sigma_max), num_steps,
                                    replace(settling, above=config.settle_above), random=draws)
    levels = block_schedule(config.schedule, num_steps, noise, config.block_size, config.order)
    return sample_rows(denoise, z, levels.repeat(1, z.shape[1] // config.block_size), random=draws)


def evaluated_levels(config: DenoiseConfig, noise: Noise, num_steps: int) -> list[float | Tensor]:
    """The noise level of every network evaluation of a solve, in order; levels by row (L,) or (B, L) where rows have
    levels of their own. Found by running the solver on one empty block, so that a solver states its evaluations once.
    """
    levels: list[float | Tensor] = []

    def record(z: Tensor, level: float | Tensor) -> Tensor:
        levels.append(level)
        return z

    block = torch.zeros(1, config.block_size, 1)
    solve(config, noise, record, num_steps, normal=lambda stream: block,
          settling=Settling(lambda: block[..., 0], torch.ones(1, config.block_size, dtype=torch.bool)))
    return levels
