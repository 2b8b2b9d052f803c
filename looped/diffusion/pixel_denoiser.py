"""An image network as a denoiser: EDM's preconditioning with all of its coefficients, since pixels are regressed
(Karras et al. 2022), and classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from looped.devices import to_device, to_like
from looped.diffusion.edm import EDM, align
from looped.diffusion.noise import block_of
from looped.tensor_types import Float, Float64, Int, Int64

Images = Float[Tensor, "batch channels down across"]
Sigma = Float[Tensor, "batch"]
Labels = Int[Tensor, "batch"]


class PixelDenoiser(nn.Module):
    """`(z, sigma, labels) -> D` for a model with `(images, level, labels, block) -> images`, whose label `num_classes`
    stands for no class.

    sigma_data: standard deviation of the pixel values. `edges`: as in `Denoiser`.
    """

    def __init__(self, model: nn.Module, sigma_data: float, *, edges: Float64[Tensor, "edges"] | None = None):
        super().__init__()
        self.model = model
        self.edm: EDM = EDM(sigma_data)
        self.edges = edges

    def owners(self, sigma: Float[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
        """The block of the core that owns each level."""
        return torch.zeros_like(sigma, dtype=torch.long) if self.edges is None else block_of(sigma, self.edges)

    def forward(self, z: Images, sigma: Sigma, labels: Labels, *, guidance: float = 1.0) -> Images:
        """The clean estimate D; each image runs through the block that owns its level. With `guidance` w other than 1:
        D(no class) + w (D(class) - D(no class)), at twice the cost."""
        D = self.edm.denoised(self.read(z, sigma, labels), z, sigma)
        if guidance == 1:
            return D
        plain = self.edm.denoised(self.read(z, sigma, torch.full_like(labels, self.model.num_classes)), z, sigma)
        return plain + guidance * (D - plain)

    def read(self, z: Images, sigma: Sigma, labels: Labels, *, block: int | None = None) -> Images:
        """The network's output F, at least float32. `block`: run this block, whether or not it owns the levels."""
        if block is None and self.edges is not None:
            return self._read_by_owners(z, sigma, labels)
        scaled = to_like(align(self.edm.c_in(sigma), z), z) * z
        F = self.model(scaled, self.edm.c_noise(sigma), labels, block=block)
        return F.to(torch.promote_types(F.dtype, torch.float32))

    def _read_by_owners(self, z: Images, sigma: Sigma, labels: Labels) -> Images:
        owners, found = self.owners(sigma), torch.empty_like(z)
        for owner in owners.unique().tolist():
            own = owners == owner
            found[own] = self.read(z[own], sigma[own], labels[own], block=owner).to(z.dtype)
        return found

    def losses(self, images: Images, eps: Images, sigma: Sigma, labels: Labels, *, weight: str,
               block: int | None = None) -> Float[Tensor, "batch"]:
        """Each image's squared error of D at its level, averaged over its pixel values; `weight`: edm or none."""
        z = images + to_like(align(sigma, images), images) * eps
        error = self.read(z, sigma, labels, block=block) - self.edm.target(images, z, sigma)
        return to_device(self.edm.residual_weight(sigma, weight), z.device) * error.square().flatten(1).mean(1)

    def solver(self, labels: Labels, guidance: float = 1.0) -> Callable[[Tensor, float], Tensor]:
        """`(z, level) -> D` for images of these classes, the form that solvers call."""
        def denoise(z: Tensor, level: float) -> Tensor:
            sigma = torch.full((len(z),), float(level), dtype=torch.float64)
            return self(z, sigma, labels, guidance=guidance)

        return denoise
