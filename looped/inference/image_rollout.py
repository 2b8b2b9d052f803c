"""Rollout of a pixel denoiser: `depth` steps of its solver from noise."""

import torch

from looped.diffusion.solver_from_config import evaluated_levels
from looped.inference.cost import Cost
from looped.inference.rollout import Rollout


class PixelRollout(Rollout):
    """Depth is the number of solver steps."""

    name = "pixels"

    def image_cost(self, depth: int, guidance: float = 1.0) -> Cost:
        """The cost of one image with `depth` steps of the configured solver."""
        networks, objective, layers = 1 if guidance == 1 else 2, self.objective, self.model.core_layers
        levels = torch.tensor(evaluated_levels(objective.config, objective.noise, depth), dtype=torch.float64)
        return Cost(0, tuple(networks * layers[block] for block in objective.denoiser.owners(levels).tolist()),
                    networks=networks)
