"""Distances between sets of images in a feature space: Fréchet distance, precision and recall.

A distance is only as good as its features, so it always carries the name of their source. It is the published FID only
for Inception-v3 with its published weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from looped.errors import UserError
from looped.tensor_types import Bool, Float, Float64

Features = Float[Tensor, "_ _"]
"""(images, feature dimension)."""

CHUNK = 1024
"""Rows of a distance matrix in memory at once."""


@dataclass(frozen=True)
class Distances:
    """`frechet`: 0 for equal means and covariances. `precision`: fraction of generated images inside the manifold of
    real ones; `recall`: fraction of real images inside that of generated ones. `by`: source of the features."""

    frechet: float
    precision: float
    recall: float
    by: str


def distances(real: Features, generated: Features, *, by: str, neighbours: int = 3) -> Distances:
    """All three distances. Raises UserError for too few images, and for features of unequal dimension."""
    if real.shape[1] != generated.shape[1]:
        raise UserError(f"features of dimension {real.shape[1]} and {generated.shape[1]} cannot be compared; take both "
                        f"from one classifier")
    for name, features in (("real", real), ("generated", generated)):
        if len(features) <= neighbours:
            raise UserError(f"{len(features)} {name} images are too few for their {neighbours} nearest neighbours; "
                            f"take {neighbours + 1} or more")
    precision, recall = precision_recall(real, generated, neighbours=neighbours)
    return Distances(frechet_distance(real, generated), precision, recall, by)


def frechet_distance(a: Features, b: Features) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) for the normal distributions with the means and (unbiased)
    covariances of both sets (Heusel et al. 2017, arXiv 1706.08500). In float64.

    The trace of the root of C_a C_b is the sum of the singular values of R_a R_b^T, where C = R^T R: this needs no root
    of a non-symmetric matrix, and fewer images than feature dimensions are no special case.
    """
    (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
    traces = root_a.square().sum() + root_b.square().sum()
    shared = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return max((mean_a - mean_b).square().sum().item() + (traces - 2 * shared).item(), 0.0)  # -1e-15 is 0


def _moments(features: Features) -> tuple[Float64[Tensor, "dim"], Float64[Tensor, "rank dim"]]:
    """(mean, R) with R^T R the covariance and no more rows in R than needed."""
    features = features.double()
    mean = features.mean(0)
    root = (features - mean) / max(len(features) - 1, 1) ** 0.5
    return mean, torch.linalg.qr(root).R if len(root) > root.shape[1] else root


def precision_recall(real: Features, generated: Features, *, neighbours: int = 3) -> tuple[float, float]:
    """(precision, recall): the fraction of one set inside the manifold of the other, which is the union of balls around
    its members, each up to its `neighbours`-th nearest neighbour (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""
    return (_within(generated, real, neighbours).double().mean().item(),
            _within(real, generated, neighbours).double().mean().item())


def _within(points: Features, centres: Features, neighbours: int) -> Bool[Tensor, "num"]:
    points, centres = points.double(), centres.double()
    # The nearest neighbour is the centre itself, at distance 0.
    radius = torch.cat([torch.cdist(part, centres).kthvalue(neighbours + 1).values for part in centres.split(CHUNK)])
    return torch.cat([(torch.cdist(part, centres) <= radius).any(1) for part in points.split(CHUNK)])
