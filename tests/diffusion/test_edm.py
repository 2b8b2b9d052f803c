"""EDM coefficients: against diffusers, at both ends of the paper's range, and row by row on batches."""

from decimal import Decimal, getcontext

import pytest
import torch

from looped.diffusion.edm import EDM, align, ode_derivative
from looped.errors import UserError

SIGMAS = [0.002, 0.05, 0.5, 1.0, 20.0, 80.0]
NAMES = ["c_skip", "c_out", "c_in", "c_noise", "weight"]


def test_coefficients_are_those_of_diffusers():
    schedulers = pytest.importorskip("diffusers").schedulers
    scheduler = schedulers.EDMEulerScheduler(sigma_data=0.5)
    edm = EDM(0.5)
    z, F = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3)
    for value in SIGMAS:
        sigma = torch.tensor(value)
        torch.testing.assert_close(edm.c_in(sigma) * z, scheduler.precondition_inputs(z, sigma))
        torch.testing.assert_close(edm.denoised(F, z, sigma), scheduler.precondition_outputs(z, F, sigma))
        torch.testing.assert_close(edm.c_noise(sigma), scheduler.precondition_noise(sigma))


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.01])
def test_float32_coefficients_are_accurate_to_a_few_units_in_the_last_place(sigma, sigma_data):
    edm = EDM(sigma_data)
    for name in NAMES:
        exact = _in_decimals(name, sigma, sigma_data)
        got = getattr(edm, name)(torch.tensor(sigma, dtype=torch.float64))
        assert got.dtype == torch.float32
        assert abs(got.item() - exact) <= 1.2e-7 * abs(exact), name
        # From a float32 sigma the rounding of sigma itself is amplified, at most by the squares.
        assert abs(getattr(edm, name)(torch.tensor(sigma)).item() - exact) <= 5e-7 * max(abs(exact), 0.1), name


def test_weight_is_one_over_c_out_squared_and_input_has_unit_variance():
    edm, sigma = EDM(0.5), torch.tensor(SIGMAS, dtype=torch.float64)
    torch.testing.assert_close(edm.weight(sigma), edm.c_out(sigma) ** -2)
    variance = edm.c_in(sigma).double() ** 2 * (sigma**2 + 0.25)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-6, atol=0)


def test_the_best_linear_network_makes_the_training_target_unit_variance():
    """c_out is the deviation of y - c_skip z: what the network has to predict has variance 1 at every level."""
    edm, sigma = EDM(0.5), torch.tensor(SIGMAS, dtype=torch.float64)
    residual = (1 - edm.c_skip(sigma).double()) ** 2 * 0.25 + edm.c_skip(sigma).double() ** 2 * sigma**2
    torch.testing.assert_close(residual.sqrt(), edm.c_out(sigma).double(), rtol=1e-4, atol=0)


def test_rows_get_their_own_noise_level():
    """A (B,) weight on (B, 1) losses once broadcast to (B, B) in a public release; rows must match one by one."""
    edm, sigma = EDM(0.5), torch.tensor([0.1, 10.0])
    z, F = torch.randn(2, 2, 2), torch.randn(2, 2, 2)  # B = L = d, so that a wrong axis would not raise
    whole = edm.denoised(F, z, sigma)
    for row in range(2):
        torch.testing.assert_close(whole[row], edm.denoised(F[row], z[row], sigma[row]))
    wrong = edm.c_skip(sigma) * z + edm.c_out(sigma) * F  # positive control
    assert not torch.allclose(wrong, whole)


def test_a_level_per_position_and_a_mismatch():
    edm, z = EDM(1.0), torch.randn(2, 3, 4)
    assert edm.denoised(z, z, torch.rand(2, 3) + 0.1).shape == z.shape
    assert align(torch.ones(2, 3), z).shape == (2, 3, 1)
    with pytest.raises(UserError, match="leading axes"):
        edm.denoised(z, z, torch.ones(3))


def test_low_precision_inputs_give_float32():
    edm, z = EDM(0.5), torch.randn(2, 3).bfloat16()
    assert edm.denoised(z, z, torch.tensor([0.01, 10.0]).bfloat16()).dtype == torch.float32
    assert edm.denoised(z, z, 0.3).dtype == torch.float32


def test_no_noise_leaves_the_clean_estimate_and_zero_derivative():
    z = torch.randn(3)
    assert torch.equal(ode_derivative(z, z, torch.tensor(2.0)), torch.zeros(3))
    torch.testing.assert_close(ode_derivative(z, 0 * z, 2.0), z / 2)
    rows = ode_derivative(z, 0 * z, torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(rows, z / torch.tensor([1.0, 2.0, 4.0]))
    torch.testing.assert_close(EDM(0.5).denoised(torch.ones(3), z, 0.0), z)


def test_sigma_data_must_be_positive():
    with pytest.raises(UserError, match="sigma_data"):
        EDM(0.0)


def _in_decimals(name: str, sigma: float, sigma_data: float) -> float:
    """The formulas with 50 decimal digits."""
    getcontext().prec = 50
    s, d = Decimal(sigma), Decimal(sigma_data)
    total = s * s + d * d
    return float({
        "c_skip": d * d / total, "c_out": s * d / total.sqrt(), "c_in": 1 / total.sqrt(), "c_noise": s.ln() / 4,
        "weight": total / (s * d) ** 2,
    }[name])
