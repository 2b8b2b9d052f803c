"""Distances between sets of images, by the features of a classifier: Fréchet distance, precision and recall.

A distance is worth what its features are worth, so it goes by the name of the classifier they are from. It is the
published FID only where that is Inception-v3 with its published weights.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from looped.errors import UserError

Features = Float[Tensor, "_ _"]
"""(images, numbers)."""

CHUNK = 1024
"""Rows of a matrix of distances that are held at once."""


@dataclass(frozen=True)
class Distances:
    """`frechet`: 0 for equal means and covariances. `precision`: the share of generated images that look real;
    `recall`: that of real ones that look as if they could be generated. `by`: whose features these are."""

    frechet: float
    precision: float
    recall: float
    by: str


def distances(real: Features, generated: Features, *, by: str, neighbours: int = 3) -> Distances:
    """All of them. Raises UserError where there are too few images, or features of two kinds."""
    if real.shape[1] != generated.shape[1]:
        raise UserError(f"features of {real.shape[1]} and of {generated.shape[1]} numbers do not compare; take both "
                        f"from one classifier")
    for name, features in (("real", real), ("generated", generated)):
        if len(features) <= neighbours:
            raise UserError(f"{len(features)} {name} images are too few for their {neighbours} nearest neighbours; "
                            f"take {neighbours + 1} or more")
    precision, recall = precision_recall(real, generated, neighbours=neighbours)
    return Distances(frechet_distance(real, generated), precision, recall, by)


def frechet_distance(a: Features, b: Features) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), of the normal distributions with the means and (unbiased)
    covariances of both sets (Heusel et al. 2017, arXiv 1706.08500). In float64.

    The trace of the root of C_a C_b is the sum of the singular values of R_a R_b^T, where C = R^T R: no root of a
    matrix that is not symmetric is taken, and a set of fewer images than numbers is no special case.
    """
    (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
    traces = root_a.square().sum() + root_b.square().sum()
    shared = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return max((mean_a - mean_b).square().sum().item() + (traces - 2 * shared).item(), 0.0)  # -1e-15 is 0


def _moments(features: Features) -> tuple[Float64[Tensor, "dim"], Float64[Tensor, "rank dim"]]:
    """(mean, R with R^T R the covariance), R with no more rows than needed."""
    features = features.double()
    mean = features.mean(0)
    root = (features - mean) / max(len(features) - 1, 1) ** 0.5
    return mean, torch.linalg.qr(root).R if len(root) > root.shape[1] else root


def precision_recall(real: Features, generated: Features, *, neighbours: int = 3) -> tuple[float, float]:
    """Shares of one set that lie within the balls around the other's members that reach to their `neighbours`-th
    nearest neighbour (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""
    return (_within(generated, real, neighbours).double().mean().item(),
            _within(real, generated, neighbours).double().mean().item())


def _within(points: Features, centres: Features, neighbours: int) -> Bool[Tensor, "num"]:
    points, centres = points.double(), centres.double()
    # The nearest of all is the centre itself, at distance 0.
    radius = torch.cat([torch.cdist(part, centres).kthvalue(neighbours + 1).values for part in centres.split(CHUNK)])
    return torch.cat([(torch.cdist(part, centres) <= radius).any(1) for part in points.split(CHUNK)])
