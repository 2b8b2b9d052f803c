"""EDM on pixels, against what is known in closed form of one Gaussian; guidance; who reads which level."""

import math
import zlib
from itertools import pairwise

import pytest
import torch
from torch import nn

from looped.config.denoise import DenoiseConfig, NoiseConfig
from looped.diffusion.edm import EDM
from looped.diffusion.noise_from_config import noise_from_config
from looped.diffusion.pixel_denoiser import PixelDenoiser
from looped.diffusion.samplers import SAMPLERS
from looped.diffusion.schedules import schedule
from looped.diffusion.solver_from_config import solve

SD, SIGMAS = 0.7, torch.tensor([0.002, 0.05, 0.5, 1.0, 20.0, 80.0], dtype=torch.float64)
SHAPE = (1, 4, 4)


class Network(nn.Module):
    """F by a formula of what the network is given; notes who is asked what."""

    num_classes = 3

    def __init__(self, F=lambda images, level, labels, block: torch.zeros_like(images)):
        super().__init__()
        self.F, self.asked = F, []

    def forward(self, images, level, labels, *, block=None):
        self.asked.append((block, level.exp().pow(4).tolist(), labels.tolist()))
        return self.F(images, level, labels, block)


def images(num, seed=0):
    return torch.randn(num, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def classes(num):
    return torch.arange(num) % 3


def test_of_a_gaussian_the_best_network_says_nothing_and_its_loss_is_one_at_every_level():
    """E[y | z] = sd^2 z / (sd^2 + sigma^2) is c_skip z, so that F = 0; and what F is asked for has unit variance, so
    that the loss of F = 0 is 1 under EDM's weight, and the posterior's variance c_out^2 without one."""
    denoiser, num = PixelDenoiser(Network(), SD), 4000
    for sigma in SIGMAS:
        levels, y, eps = sigma.expand(num), SD * images(num), images(num, seed=1)
        z = y + sigma * eps
        best = SD**2 / (SD**2 + sigma**2) * z
        torch.testing.assert_close(denoiser(z, levels, classes(num)), best, rtol=1e-6, atol=1e-9)
        weighted, plain = (denoiser.losses(y, eps, levels, classes(num), weight=weight) for weight in ("edm", "none"))
        assert weighted.mean().item() == pytest.approx(1.0, abs=0.02)
        posterior = SD**2 * sigma**2 / (SD**2 + sigma**2)
        assert plain.mean().item() == pytest.approx(posterior.item(), rel=0.02)


def test_the_linear_regression_of_the_target_on_the_input_is_zero():
    """In float64: whatever linear map the network could learn, the preconditioning has done already."""
    y, eps = SD * images(20_000).flatten(), images(20_000, seed=1).flatten()
    for sigma in SIGMAS:
        z, edm = y + sigma * eps, EDM(SD)
        target, given = edm.target(y, z, sigma), edm.c_in(sigma) * z
        assert abs((target * given).mean()) < 0.01
        assert target.var().item() == pytest.approx(1, abs=0.02)
        torch.testing.assert_close(edm.denoised(target, z, sigma), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_loss_is_karras_equation_8_in_float64(sigma_data):
    """lambda |c_skip z + c_out F - y|^2 with lambda = (sigma^2 + sd^2) / (sigma sd)^2, and lambda c_out^2 = 1."""
    network = Network(lambda images, level, labels, block: 0.3 * images + level.view(-1, 1, 1, 1))
    denoiser, num = PixelDenoiser(network, sigma_data), len(SIGMAS)
    y, eps, labels, sd = images(num), images(num, seed=1), classes(num), sigma_data
    rows = SIGMAS.view(-1, 1, 1, 1)
    z = y + rows * eps
    F = 0.3 * z / (rows**2 + sd**2).sqrt() + rows.log() / 4
    c_out = rows * sd / (rows**2 + sd**2).sqrt()
    error = (sd**2 / (rows**2 + sd**2) * z + c_out * F - y).square().flatten(1).mean(1)
    weight = (SIGMAS**2 + sd**2) / (SIGMAS * sd) ** 2
    torch.testing.assert_close(weight * c_out.flatten() ** 2, torch.ones(num, dtype=torch.float64))
    for name, exact in (("edm", weight * error), ("none", error)):
        got = denoiser.losses(y, eps, SIGMAS, labels, weight=name)
        torch.testing.assert_close(got, exact, rtol=2e-4, atol=0)  # at 0.002 float32 coefficients leave that much


@pytest.mark.parametrize(("solver", "num_steps", "off"), [("euler", 400, 0.01), ("heun", 100, 0.01),
                                                          ("dpmpp-2m", 200, 0.01), ("ancestral", 400, 0.02)])
def test_solvers_with_the_exact_denoiser_draw_the_gaussian(solver, num_steps, off):
    noise = noise_from_config(NoiseConfig(sigma_min=0.002, sigma_max=80.0))
    config = DenoiseConfig(solver=solver, schedule="karras", context="inject")
    x = solve(config, noise, PixelDenoiser(Network(), SD).solver(classes(2000)), num_steps,
              normal=lambda stream: images(2000, seed=zlib.crc32(stream.encode())))
    assert abs(x.mean().item()) < 0.02
    assert x.std().item() == pytest.approx(SD, rel=off)
    standard = x.flatten() / x.std()
    assert standard.pow(4).mean().item() == pytest.approx(3, abs=0.1)  # of a normal distribution


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_a_solver_halves_its_error_as_often_as_its_order_says(solver, order):
    """The flow of a Gaussian is z sd / sqrt(sd^2 + sigma_max^2)."""
    denoise, z = PixelDenoiser(Network(), SD).solver(classes(8)), 5 * images(8)
    exact = z * math.sqrt((SD**2 + 1e-8) / (SD**2 + 25))
    noise = noise_from_config(NoiseConfig(sigma_min=1e-4, sigma_max=5.0))
    errors = [(SAMPLERS[solver](denoise, z, schedule("karras", n, noise)) - exact).abs().max().item()
              for n in (32, 64, 128)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_guidance_of_one_is_the_plain_class_and_reads_once():
    network = Network(lambda images, level, labels, block: images + labels.view(-1, 1, 1, 1))
    denoiser, z, sigma = PixelDenoiser(network, SD), images(6), SIGMAS
    plain = denoiser(z, sigma, classes(6))
    network.asked.clear()
    assert torch.equal(denoiser(z, sigma, classes(6), guidance=1.0), plain)
    assert len(network.asked) == 1
    no_class = denoiser(z, sigma, torch.full((6,), 3))
    torch.testing.assert_close(denoiser(z, sigma, classes(6), guidance=0.0), no_class)
    guided = denoiser(z, sigma, classes(6), guidance=2.5)
    torch.testing.assert_close(guided, no_class + 2.5 * (plain - no_class))
    assert [asked[2] for asked in network.asked[-2:]] == [classes(6).tolist(), [3] * 6]


def test_each_level_is_read_by_its_owner_also_when_the_class_is_guided():
    edges = torch.tensor([80.0, 2.0, 0.1, 0.002], dtype=torch.float64)
    network = Network(lambda images, level, labels, block: torch.full_like(images, float(block)))
    denoiser, sigma = PixelDenoiser(network, SD, edges=edges), SIGMAS
    assert denoiser.owners(sigma).tolist() == [2, 2, 1, 1, 0, 0]
    read = denoiser.read(images(6), sigma, classes(6))
    assert read[:, 0, 0, 0].tolist() == [2, 2, 1, 1, 0, 0]
    network.asked.clear()
    denoiser(images(6), sigma, classes(6), guidance=2.0)
    for block, levels, _ in network.asked:
        assert denoiser.owners(torch.tensor(levels, dtype=torch.float64)).tolist() == [block] * len(levels)
    assert len(network.asked) == 6
