"""A picture of the noise levels that each block of a core has, over the density that training draws them from."""

from pathlib import Path

import torch
from torch import Tensor

from looped.config_blocks import BlocksConfig
from looped.diffusion.noise import Noise, edges_of, interval
from looped.evaluation.plots import colours, new_figure, save

NUM_POINTS = 100
"""Of the curve, in each block."""
GREY = "#4a4a4a"


def plot_partition(blocks: BlocksConfig, noise: Noise, path: Path) -> None:
    """Blocks as stretches of the noise axis with their numbers and masses, hatched where two of them train; the curve
    is the density of ln sigma without the atom at sigma_max, whose share is in the title."""
    edges, continuous = edges_of(blocks, noise), noise.continuous
    figure, axes = new_figure()
    densities = [_density(noise, *edges[block : block + 2]) for block in range(blocks.num)]
    top = 1.3 * max(density.max().item() for _, density in densities)
    for block, (colour, (sigma, density)) in enumerate(zip(colours(blocks.num), densities, strict=True)):
        high, low = edges[block].item(), edges[block + 1].item()
        widest = interval(block, edges, blocks.overlap)
        axes.axvspan(low, high, color=colour, alpha=0.15, linewidth=0)
        axes.fill_between(sigma, density, color=colour, alpha=0.35, linewidth=0)
        axes.plot(sigma, density, color=GREY, linewidth=1.4, label="density of training" if block == 0 else None)
        for start, stop in ((widest[0], low), (high, widest[1])):
            if start < stop:
                axes.axvspan(start, stop, facecolor="none", edgecolor=colour, alpha=0.5, hatch="////", linewidth=0)
        mass = (continuous.cdf(high) - continuous.cdf(low)).item()
        axes.text((low * high) ** 0.5, 0.98 * top, f"{block}\n{mass:.3f}", ha="center", va="top",
                  fontsize=8 if blocks.num < 6 else 6, color=colour)
    for edge in edges.tolist():
        axes.axvline(edge, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(edges.tolist(), [f"{edge:.3g}" for edge in edges.tolist()], rotation=0 if blocks.num < 4 else 45)
    axes.minorticks_off()
    axes.set_ylim(0, top)
    axes.set_xlabel("noise level sigma; hatched: the neighbour trains there as well")
    axes.set_ylabel("density of ln sigma")
    atom = 1 - noise.cdf(noise.sigma_max * (1 - 1e-9)).item()
    besides = f"; besides, {atom:.2g} of all at sigma_max" if atom > 1e-6 else ""
    axes.set_title(f"number of each block and the mass of its levels{besides}", fontsize=9)
    save(figure, axes, path)


def _density(noise: Noise, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """(levels, density of ln sigma) from edge to edge."""
    sigma = torch.linspace(low.log(), high.log(), NUM_POINTS, dtype=torch.float64).exp()
    sigma = sigma.clamp(noise.sigma_min, noise.sigma_max)  # exp(log(sigma)) may be one unit off
    return sigma, noise.continuous.log_density(sigma).exp()
