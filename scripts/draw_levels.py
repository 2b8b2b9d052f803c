"""Plot of the noise levels of solver steps and of blocks, for log-normal levels: docs/levels.svg, or a given file.

    python scripts/draw_levels.py [FILE]
"""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from looped.config import load_config
from looped.diffusion.noise import Noise, partition
from looped.diffusion.noise_from_config import noise_from_config
from looped.diffusion.schedules import SCHEDULES, schedule

NUM_STEPS, NUM_BLOCKS = 8, 3
LOG_NORMAL = {"denoise.noise.distribution": "log-normal"}
BLOCK_COLOURS = ("#c6d4f0", "#8fa8de", "#5a7bc8")


def draw(path: Path) -> None:
    """Schedules on the left, blocks on the right, over one axis of levels."""
    noise = noise_from_config(load_config(None, LOG_NORMAL).denoise.noise)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_steps(left, noise)
    draw_blocks(right, noise)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlim(noise.sigma_max * 1.1, noise.sigma_min / 1.1)
        axes.set_xticks(ticks := [20, 10, 5, 2, 1, 0.5], [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("noise level $\\sigma$")
        axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": "levels"}):  # the same file each time
        figure.savefig(path, metadata={"Date": None})


def draw_steps(axes: Axes, noise: Noise) -> None:
    """The noise levels at which each schedule evaluates the network."""
    for place, name in enumerate(SCHEDULES):
        levels = schedule(name, NUM_STEPS, noise)[:-1]
        axes.plot(levels, [place] * NUM_STEPS, "o-", color="#3f51b5", markersize=5, linewidth=1)
    axes.set_yticks(range(len(SCHEDULES)), list(SCHEDULES))
    axes.set_ylim(-0.6, len(SCHEDULES) - 0.4)
    axes.set_title(f"{NUM_STEPS} solver steps under each schedule", fontsize=10)


def draw_blocks(axes: Axes, noise: Noise) -> None:
    """The density of ln sigma, divided into blocks of equal mass."""
    edges = partition(noise, NUM_BLOCKS)
    for block, colour in enumerate(BLOCK_COLOURS):
        sigma = torch.linspace(edges[block].log(), edges[block + 1].log(), 60, dtype=torch.float64).exp()
        sigma = sigma.clamp(noise.sigma_min, noise.sigma_max)  # exp(log(sigma)) may be off by rounding
        density = noise.continuous.log_density(sigma).exp()
        axes.fill_between(sigma, density, color=colour, linewidth=0)
        axes.text((edges[block] * edges[block + 1]).sqrt(), 0.03, f"block {block}", ha="center", fontsize=9)
    axes.set_ylabel("density of ln $\\sigma$")
    axes.set_ylim(0)
    axes.set_title(f"{NUM_BLOCKS} blocks of equal mass (log-normal levels)", fontsize=10)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1] / "docs" / "levels.svg")
