"""Noise schedules: against diffusers and scipy, exact ends, float64."""

import numpy as np
import pytest
import torch
from scipy import stats

from looped.diffusion.noise import Adaptive, LogNormal, LogUniform, ShareAtMax
from looped.diffusion.schedules import SCHEDULES, block_schedule, schedule
from looped.errors import UserError

PAPER = LogNormal(-1.2, 1.2, 0.002, 80.0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 32, 128])
@pytest.mark.parametrize("noise", [PAPER, ShareAtMax(LogUniform(0.5, 20.0), 0.5), Adaptive(0.3, 7.1)], ids=str)
def test_levels_fall_from_sigma_max_to_sigma_min_and_end_in_zero(name, num_steps, noise):
    sigmas = schedule(name, num_steps, noise)
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas[0].item() == noise.sigma_max
    assert sigmas[-1].item() == 0
    assert (sigmas.diff() < 0).all()
    if num_steps > 1:
        assert sigmas[-2].item() == noise.sigma_min


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_karras_is_that_of_diffusers(rho):
    schedulers = pytest.importorskip("diffusers").schedulers
    scheduler = schedulers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=rho)
    scheduler.set_timesteps(18)
    np.testing.assert_allclose(schedule("karras", 18, PAPER, rho), scheduler.sigmas, rtol=2e-6)


def test_log_linear_is_geometric():
    np.testing.assert_allclose(schedule("log-linear", 9, PAPER)[:-1], np.geomspace(80.0, 0.002, 9), rtol=1e-13)


def test_quantile_has_equal_training_mass_between_levels_whatever_the_atom():
    cuts = (np.log([0.5, 20.0]) - 0.7) / 1.2
    twin = stats.truncnorm(*cuts, loc=0.7, scale=1.2)
    inner = LogNormal(0.7, 1.2, 0.5, 20.0)
    for noise in (inner, ShareAtMax(inner, 0.5)):
        sigmas = schedule("quantile", 9, noise)
        np.testing.assert_allclose(np.diff(twin.cdf(sigmas[:-1].log())), -1 / 8, atol=1e-12)


def test_quantile_of_a_log_uniform_is_log_linear():
    noise = LogUniform(0.5, 20.0)
    torch.testing.assert_close(schedule("quantile", 7, noise), schedule("log-linear", 7, noise))


@pytest.mark.parametrize("rho", [7.0, 3.0])
def test_karras_of_a_range_is_k_diffusions_get_sigmas_karras(rho):
    ramp = np.linspace(0, 1, 10)  # k_diffusion/sampling.py
    low, high = 0.1 ** (1 / rho), 10 ** (1 / rho)
    theirs = (high + ramp * (low - high)) ** rho
    np.testing.assert_allclose(schedule("karras", 10, (0.1, 10.0), rho)[:-1], theirs, rtol=1e-13)


@pytest.mark.parametrize(("arguments", "word"), [
    (("quantile", 4, (0.1, 10.0)), "needs the training distribution"),
    (("karras", 4, (10.0, 0.1)), "not a range"),
    (("karras", 4, 0.1), r"pass the range \(sigma_min, sigma_max\)"),
    (("karas", 4, PAPER), "did you mean 'karras'"),
    (("karras", 0, PAPER), "num_steps 0"),
    (("karras", 4, PAPER, 0.0), "rho"),
])
def test_bad_settings_are_named(arguments, word, unchecked):
    with pytest.raises(UserError, match=word):
        schedule(*arguments)


def test_blocks_from_left_to_right_lose_their_noise_group_by_group():
    noise = LogUniform(0.5, 20.0)
    low, high = 0.5, 20.0

    def levels(num_steps):
        return block_schedule("log-linear", num_steps, noise, 4, "left-to-right").tolist()

    assert levels(1) == [[high] * 4]
    assert levels(2) == [[high] * 4, [low, low, high, high]]
    assert levels(4) == [[low] * row + [high] * (4 - row) for row in range(4)]
    assert levels(8) == [[low] * row + [own] + [high] * (3 - row) for row in range(4) for own in (high, low)]
    assert len(levels(6)) == 6
    assert levels(6)[-1][:3] == [low] * 3


def test_blocks_together_follow_one_schedule():
    noise = LogUniform(0.5, 20.0)
    levels = block_schedule("karras", 5, noise, 3, "together")
    assert torch.equal(levels, schedule("karras", 5, noise)[:5, None].expand(5, 3))
