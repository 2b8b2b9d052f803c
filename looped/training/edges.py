"""Edges between blocks from measured difficulty: how a finished run's cross-entropy rises over its noise levels.

A run with `denoise.noise.distribution adaptive` has learned where its loss moves (`diffusion.noise.Adaptive`). Edges of
equal mass under what it has learned give every block the same share of that rise, as the time warping of CDCD gives
every part of training (Dieleman et al. 2022, arXiv 2211.15089, section 4.2).
"""

from looped.config import Config
from looped.diffusion.noise import Adaptive, partition
from looped.errors import UserError
from looped.training.runs import load_run


def with_measured_edges(config: Config) -> Config:
    """The config with `blocks.edges` in place of `blocks.edges_from`, to six digits; itself where that is not set.

    Raises UserError for a run that has measured nothing, or other noise levels.
    """
    source = config.blocks.edges_from
    if source is None:
        return config
    pilot = load_run(source, ema=False)
    noise = getattr(pilot.objective, "noise", None)
    learned = None if noise is None else noise.continuous
    if not isinstance(learned, Adaptive):
        raise UserError(f"blocks.edges_from {source} has measured no difficulty; give a run with objective denoise and "
                        f"denoise.noise.distribution adaptive")
    if learned.num_seen.min() < learned.min_count:
        raise UserError(f"blocks.edges_from {source} has seen one of its noise levels {learned.num_seen.min():.0f} "
                        f"times, and {learned.min_count:g} are needed; train it for longer")
    for name in ("sigma_min", "sigma_max"):
        ours, theirs = getattr(config.denoise.noise, name), getattr(learned, name)
        if ours != theirs:
            raise UserError(f"blocks.edges_from {source} has {name} {theirs:g}, and denoise.noise.{name} is {ours:g}; "
                            f"give both the same")
    edges = [float(f"{edge:.6g}") for edge in partition(learned, config.blocks.num)[1:-1].tolist()]
    return config.replace(**{"blocks.edges": edges, "blocks.edges_from": None})
