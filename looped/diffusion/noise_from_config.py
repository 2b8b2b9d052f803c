"""Noise levels from a config: the distribution that `denoise.noise` describes, and its partition by `blocks`."""

import torch
from torch import Tensor

from looped.config.blocks import BlocksConfig
from looped.config.denoise import NoiseConfig
from looped.diffusion.noise import Adaptive, LogNormal, LogUniform, Noise, ShareAtMax, partition
from looped.errors import UserError
from looped.tensor_types import Float64


def noise_from_config(config: NoiseConfig) -> Noise:
    """The distribution that `denoise.noise` describes, on the CPU, also for a model without memory (device meta)."""
    ends = (config.sigma_min, config.sigma_max)
    with torch.device("cpu"):
        if config.distribution == "log-normal":
            noise: Noise = LogNormal(config.log_mean, config.log_std, *ends)
        else:
            noise = {"log-uniform": LogUniform, "adaptive": Adaptive}[config.distribution](*ends)
    return ShareAtMax(noise, config.share_at_max) if config.share_at_max else noise


def edges_of(config: BlocksConfig, noise: Noise) -> Float64[Tensor, "edges"]:
    """The descending edges that `blocks` describes, from sigma_max to sigma_min, on the CPU.

    Raises UserError if they have yet to be measured.
    """
    if config.edges_from is not None:
        raise UserError(f"blocks.edges_from {config.edges_from} is not read here; set blocks.edges to the edges "
                        f"that `looped train` wrote to its run's config.yaml")
    with torch.device("cpu"):
        if config.edges is not None:
            return torch.tensor([noise.sigma_max, *config.edges, noise.sigma_min], dtype=torch.float64)
        even = LogUniform(noise.sigma_min, noise.sigma_max)
        return partition(noise if config.partition == "mass" else even, config.num)


def block_shares(config: BlocksConfig, noise: Noise) -> Float64[Tensor, "blocks"]:
    """The fraction of training steps that train each block: all steps train `blocks.alone` if it is set, else
    `blocks.choose` decides. An atom at sigma_max belongs to block 0. On the CPU."""
    with torch.device("cpu"):
        if config.alone is not None:
            return torch.eye(config.num, dtype=torch.float64)[config.alone]
        if config.choose == "uniform":
            return torch.full((config.num,), 1 / config.num, dtype=torch.float64)
        return -noise.cdf(edges_of(config, noise)).diff()
