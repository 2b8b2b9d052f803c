"""Noise-level edges between blocks, from the rise of a finished run's cross-entropy over its noise levels.

A run with `denoise.noise.distribution adaptive` has learned where its loss changes with the noise level
(`diffusion.noise.Adaptive`). Edges of equal mass under the learned distribution give every block the same rise of the
cross-entropy, as CDCD's time warping does in training (Dieleman et al. 2022, arXiv 2211.15089, section 4.2).
"""

from looped.config import Config
from looped.diffusion.noise import Adaptive, partition
from looped.errors import UserError
from looped.training.runs import load_run


def with_measured_edges(config: Config) -> Config:
    """The config with `blocks.edges`, to six digits, in place of `blocks.edges_from`; unchanged if that is not set.

    Raises UserError for a run without a measurement, or with another range of noise levels.
    """
    source = config.blocks.edges_from
    if source is None:
        return config
    pilot = load_run(source, ema=False)
    noise = getattr(pilot.objective, "noise", None)
    learned = None if noise is None else noise.continuous
    if not isinstance(learned, Adaptive):
        raise UserError(f"blocks.edges_from {source} has no measured cross-entropy; give a run with objective denoise "
                        f"and denoise.noise.distribution adaptive")
    if learned.num_seen.min() < learned.min_count:
        raise UserError(f"blocks.edges_from {source} has seen one of its noise levels {learned.num_seen.min():.0f} "
                        f"times, and {learned.min_count:g} are needed; train it longer")
    for name in ("sigma_min", "sigma_max"):
        ours, theirs = getattr(config.denoise.noise, name), getattr(learned, name)
        if ours != theirs:
            raise UserError(f"blocks.edges_from {source} has {name} {theirs:g}, and denoise.noise.{name} is {ours:g}; "
                            f"give both the same")
    edges = [float(f"{edge:.6g}") for edge in partition(learned, config.blocks.num)[1:-1].tolist()]
    return config.replace(**{"blocks.edges": edges, "blocks.edges_from": None})
