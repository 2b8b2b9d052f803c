"""EDM preconditioning: a network that always sees and predicts unit-scale numbers, whatever the noise level.

`D = c_skip z + c_out F(c_in z, c_noise)`: Karras et al. 2022 (arXiv 2206.00364), table 1 and equations 7 and 8. Every
coefficient is a sum or product of positive numbers, so float32 holds it to a few units in the last place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from looped.devices import to_device, to_like
from looped.errors import UserError
from looped.tensor_types import Float


@dataclass(frozen=True)
class EDM:
    """The coefficients, in float32, for data whose coordinates have standard deviation `sigma_data`."""

    sigma_data: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < float("inf"):
            raise UserError(f"sigma_data {self.sigma_data} is not a positive number; "
                            f"use the standard deviation of a target's coordinates")

    def c_skip(self, sigma: Float[Tensor, "*batch"] | float) -> Float[Tensor, "*batch"]:
        """Fraction of `z` that D keeps: 1 at low noise, 0 at high noise."""
        sigma = _wide(sigma)
        return (self.sigma_data**2 / (sigma**2 + self.sigma_data**2)).float()

    def c_out(self, sigma: Float[Tensor, "*batch"] | float) -> Float[Tensor, "*batch"]:
        """Scale of the network's contribution."""
        sigma = _wide(sigma)
        return (sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()).float()

    def c_in(self, sigma: Float[Tensor, "*batch"] | float) -> Float[Tensor, "*batch"]:
        """Scale that brings `z` to unit variance."""
        sigma = _wide(sigma)
        return (1 / (sigma**2 + self.sigma_data**2).sqrt()).float()

    def c_noise(self, sigma: Float[Tensor, "*batch"] | float) -> Float[Tensor, "*batch"]:
        """The noise level as the network receives it, ln(sigma) / 4."""
        return (_wide(sigma).log() / 4).float()

    def weight(self, sigma: Float[Tensor, "*batch"] | float) -> Float[Tensor, "*batch"]:
        """Loss weight `1 / c_out^2`; meant for a squared error, and very large at low noise."""
        sigma = _wide(sigma)
        return ((sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2).float()

    def denoised(
        self, F: Float[Tensor, "*shape"], z: Float[Tensor, "*shape"], sigma: Float[Tensor, "*batch"] | float
    ) -> Float[Tensor, "*shape"]:
        """`D = c_skip z + c_out F`, at least float32; `sigma` belongs to the leading axes of `z`."""
        c_skip, c_out = align(self.c_skip(sigma), z), align(self.c_out(sigma), z)
        return to_device(c_skip, z.device) * z + to_device(c_out, z.device) * F

    def target(
        self, y: Float[Tensor, "*shape"], z: Float[Tensor, "*shape"], sigma: Float[Tensor, "*batch"] | float
    ) -> Float[Tensor, "*shape"]:
        """The F for which D equals `y`: `(y - c_skip z) / c_out`, of unit variance at every level (equation 8)."""
        c_skip, c_out = align(self.c_skip(sigma), z), align(self.c_out(sigma), z)
        return (y - to_device(c_skip, z.device) * z) / to_device(c_out, z.device)

    def residual_weight(self, sigma: Float[Tensor, "*batch"], weight: str) -> Float[Tensor, "*batch"]:
        """The factor on F's squared error that gives D's squared error the `weight` edm (then 1) or none (c_out^2)."""
        return torch.ones_like(sigma, dtype=torch.float32) if weight == "edm" else self.c_out(sigma).square()


def align(coefficient: Float[Tensor, "*batch"], z: Float[Tensor, "*shape"]) -> Float[Tensor, "*aligned"]:
    """`coefficient`, one per batch element (or per position), with trailing axes of 1, so that it broadcasts over `z`.

    A (B,) vector times a (B, L, d) or (B, 1) tensor would broadcast over the wrong axis without an error.
    """
    if coefficient.ndim > z.ndim or coefficient.shape != z.shape[: coefficient.ndim]:
        raise UserError(f"sigma of shape {tuple(coefficient.shape)} does not match the leading axes of z "
                        f"{tuple(z.shape)}; pass one noise level, one per batch element, or one per position")
    return coefficient.reshape(*coefficient.shape, *[1] * (z.ndim - coefficient.ndim))  # (B,) -> (B, 1, 1)


def ode_derivative(
    z: Float[Tensor, "*shape"], D: Float[Tensor, "*shape"], sigma: Float[Tensor, "*batch"] | float
) -> Float[Tensor, "*shape"]:
    """`dz/dsigma = (z - D) / sigma` of the probability-flow ODE (Karras et al. 2022, algorithm 1), in z's precision."""
    if isinstance(sigma, Tensor) and sigma.ndim:  # one level for all needs no shape, and does not promote z
        sigma = to_like(align(sigma, z), z)
    return (z - D) / sigma


def _wide(sigma: Tensor | float) -> Tensor:
    """At least float32: bf16 has 8 bits, too few to distinguish neighbouring noise levels."""
    sigma = torch.as_tensor(sigma)
    return sigma.to(torch.promote_types(sigma.dtype, torch.float32))
