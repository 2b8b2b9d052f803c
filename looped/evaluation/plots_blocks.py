"""Plot of the noise levels that each block of a core owns, over the density that training draws them from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from looped.config.blocks import BlocksConfig
from looped.diffusion import masking
from looped.diffusion.noise import Noise, intervals
from looped.diffusion.noise_from_config import edges_of
from looped.evaluation.plots import colours, new_figure, save

NUM_POINTS = 100
"""Points of the density curve per block."""
GREY = "#4a4a4a"


def plot_partition(blocks: BlocksConfig, noise: Noise, path: Path) -> None:
    """Blocks as intervals of the noise axis with their indices and masses, hatched where two of them train. The curve
    is the density of ln sigma without the atom at sigma_max, whose mass is in the title."""
    edges, continuous = edges_of(blocks, noise), noise.continuous
    figure, axes = new_figure()
    axes.set_xscale("log")

    def density(high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        sigma = torch.linspace(low.log(), high.log(), NUM_POINTS, dtype=torch.float64).exp()
        sigma = sigma.clamp(noise.sigma_min, noise.sigma_max)  # exp(log(sigma)) may be off by rounding
        return sigma, continuous.log_density(sigma).exp()

    _draw(axes, edges, intervals(edges, blocks.overlap), density,
          continuous.cdf(edges), (edges[:-1] * edges[1:]).sqrt())
    axes.set_xlabel("noise level sigma; hatched: also trained by the neighbouring block")
    axes.set_ylabel("density of ln sigma")
    atom = 1 - noise.cdf(noise.sigma_max * (1 - 1e-9)).item()
    besides = f"; {atom:.2g} of all draws are at sigma_max" if atom > 1e-6 else ""
    axes.set_title(f"index of each block and the mass of its levels{besides}", fontsize=9)
    save(figure, axes, path)


def plot_mask_partition(blocks: BlocksConfig, schedule: str, path: Path) -> None:
    """The same for masked diffusion: blocks as intervals of the fraction of masked tokens, with its density under
    uniform times t."""
    edges = masking.mask_edges(blocks.num)
    figure, axes = new_figure()

    def density(high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        ends = masking.time_of(schedule, torch.linspace(low, high, NUM_POINTS + 1, dtype=torch.float64))
        levels = masking.level(schedule, (ends[:-1] + ends[1:]) / 2)
        return levels, ends.diff() * NUM_POINTS / (high - low)

    _draw(axes, edges, [masking.mask_interval(block, edges, blocks.overlap) for block in range(blocks.num)], density,
          masking.time_of(schedule, edges), (edges[:-1] + edges[1:]) / 2)
    axes.set_xlabel("fraction of masked tokens, 1 - alpha; hatched: also trained by the neighbouring block")
    axes.set_ylabel("density at uniform times")
    axes.set_title("index of each block and its fraction of the times", fontsize=9)
    save(figure, axes, path)


def _draw(axes: Any, edges: Tensor, intervals: Sequence[tuple[float, float]],
          density: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], cdf: Tensor, middles: Tensor) -> None:
    """`intervals`: the lowest and highest level that each block trains on. `density`: (levels, density) from one edge
    to the next lower one. `cdf`: its values at the edges. `middles`: positions of the indices."""
    num = len(intervals)
    densities = [density(edges[block], edges[block + 1]) for block in range(num)]
    top = 1.3 * max(curve.max().item() for _, curve in densities)
    for block, (colour, (levels, curve)) in enumerate(zip(colours(num), densities, strict=True)):
        high, low = edges[block].item(), edges[block + 1].item()
        axes.axvspan(low, high, color=colour, alpha=0.15, linewidth=0)
        axes.fill_between(levels, curve, color=colour, alpha=0.35, linewidth=0)
        axes.plot(levels, curve, color=GREY, linewidth=1.4, label="density of training" if block == 0 else None)
        for start, stop in ((intervals[block][0], low), (high, intervals[block][1])):
            if start < stop:
                axes.axvspan(start, stop, facecolor="none", edgecolor=colour, alpha=0.5, hatch="////", linewidth=0)
        axes.text(middles[block].item(), 0.98 * top, f"{block}\n{(cdf[block] - cdf[block + 1]).item():.3f}",
                  ha="center", va="top", fontsize=8 if num < 6 else 6, color=colour)
    for edge in edges.tolist():
        axes.axvline(edge, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xticks(edges.tolist(), [f"{edge:.3g}" for edge in edges.tolist()], rotation=0 if num < 4 else 45)
    axes.minorticks_off()
    axes.set_ylim(0, top)
