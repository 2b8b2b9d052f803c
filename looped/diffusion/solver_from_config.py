"""Runs the solver of a config, with its schedule and the order in which the tokens of a block are denoised."""

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
    """The last estimate (B, L, d) after `num_steps` solver steps from pure noise; L is a multiple of the block size.

    denoise: (z, level) -> D, with one `level` for all rows, or one per row (L,) or (B, L). normal: standard normal
    draws of z's shape for a stream, "start" or "step0", "step1", ... settling: required by the order `confidence`.
    """
    z = start_of(config, noise, normal)

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


def start_of(config: DenoiseConfig, noise: Noise, normal: Callable[[str], Tensor]) -> Tensor:
    """The start of a solve: pure noise at sigma_max, or zeros (`denoise.start`)."""
    z = noise.sigma_max * normal("start")
    return z if config.start == "noise" else torch.zeros_like(z)


def evaluated_levels(config: DenoiseConfig, noise: Noise, num_steps: int) -> list[float | Tensor]:
    """The noise level of every network evaluation of a solve, in order; one per row (L,) or (B, L) if rows differ.

    Recorded by running the solver on one block of zeros, so that only the solver defines its evaluations.
    """
    levels: list[float | Tensor] = []

    def record(z: Tensor, level: float | Tensor) -> Tensor:
        levels.append(level)
        return z

    block = torch.zeros(1, config.block_size, 1)
    solve(config, noise, record, num_steps, normal=lambda stream: block,
          settling=Settling(lambda: block[..., 0], torch.ones(1, config.block_size, dtype=torch.bool)))
    return levels
