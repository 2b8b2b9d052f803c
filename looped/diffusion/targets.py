"""Clean vectors, the targets of denoising: one normalised row per token.

The norm is fixed, so a learned table cannot make denoising easy by growing; only the directions are learned.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looped.config.denoise import TargetConfig
from looped.tensor_types import Float, Int

DEFAULT_DIM = 16


def target_dim(config: TargetConfig, width: int) -> int:
    """The dimension of y for an input embedding of `width`."""
    return width if config.tied else config.dim or DEFAULT_DIM


class TargetEmbedding(nn.Module):
    """Token -> y. Rows have unit RMS per coordinate (`rms`) or unit norm (`l2`, the paper's), times `scale`.

    A tied embedding owns no weight: its rows are the normalised rows of the `source` given at each call.
    """

    def __init__(self, vocab_size: int, config: TargetConfig, width: int):
        super().__init__()
        self.config = config
        self.dim: int = target_dim(config, width)
        self.weight: nn.Parameter | None = None if config.tied else nn.Parameter(torch.randn(vocab_size, self.dim))

    @property
    def row_norm(self) -> float:
        """The Euclidean norm of every row."""
        return self.config.scale * (math.sqrt(self.dim) if self.config.normalise == "rms" else 1.0)

    @property
    def sigma_data(self) -> float:
        """EDM's sigma_data: the root mean square of a coordinate of y (1/sqrt(d) for unit-norm rows, not 0.5), unless
        the config sets it."""
        return self.config.sigma_data or self.row_norm / math.sqrt(self.dim)

    def table(self, source: Float[Tensor, "vocab width"] | None = None) -> Float[Tensor, "vocab dim"]:
        """All rows, differentiable."""
        weight = source if self.weight is None else self.weight
        return self.row_norm * F.normalize(weight.float(), dim=-1)

    def forward(self, tokens: Int[Tensor, "*batch"],
                source: Float[Tensor, "vocab width"] | None = None) -> Float[Tensor, "*batch dim"]:
        """The rows of `tokens`; only those are normalised."""
        weight = source if self.weight is None else self.weight
        return self.row_norm * F.normalize(F.embedding(tokens, weight).float(), dim=-1)
