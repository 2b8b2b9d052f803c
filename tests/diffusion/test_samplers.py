"""Solvers on Gaussian data, where the denoiser, the ODE's solution and the posterior are known in closed form.

For x ~ N(mu, s^2): D = mu + s^2 / (s^2 + sigma^2) (z - mu); along the ODE (z - mu) / sqrt(s^2 + sigma^2) is constant.
"""

import math

import pytest
import torch

from looped.diffusion.noise import LogUniform
from looped.diffusion.samplers import (
    SAMPLERS,
    sample_ancestral,
    sample_dpmpp_2m,
    sample_euler,
    sample_heun,
    sample_restart,
    sample_rows,
)
from looped.diffusion.schedules import schedule
from looped.errors import UserError

MU, S = 0.7, 0.5
NOISE = LogUniform(0.02, 10.0)


def exact_denoiser(z, sigma):
    return MU + S**2 / (S**2 + sigma**2) * (z - MU)


def draws(seed, count=20_000):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start(count=20_000):
    return MU + math.sqrt(S**2 + NOISE.sigma_max**2) * draws(0, count)


def random(step):
    return draws(100 + step)


def solution(z):
    """What the ODE's exact solution, read at sigma_min, is denoised to."""
    low = MU + (z - MU) * math.sqrt((S**2 + NOISE.sigma_min**2) / (S**2 + NOISE.sigma_max**2))
    return exact_denoiser(low, NOISE.sigma_min)


def error(sampler, num_steps):
    z = start(1)
    return (sampler(exact_denoiser, z, schedule("log-linear", num_steps, NOISE)) - solution(z)).abs().item()


@pytest.mark.parametrize(("sampler", "order"), [(sample_euler, 1), (sample_heun, 2), (sample_dpmpp_2m, 2)])
def test_the_error_falls_with_the_order_of_the_solver(sampler, order):
    slope = math.log2(error(sampler, 129) / error(sampler, 257))
    assert slope == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp-2m", "ancestral"])
def test_solvers_recover_the_gaussian(name):
    out = SAMPLERS[name](exact_denoiser, start(), schedule("log-linear", 200, NOISE), random=random)
    assert out.mean().item() == pytest.approx(MU, abs=5 * S / len(out) ** 0.5)
    assert out.std().item() == pytest.approx(S, rel=0.03)


def test_ancestral_steps_are_the_exact_posterior_of_the_noising_process():
    # With D known for certain, two steps from sigma to sigma'' have the moments of one: DDPM's posterior composes.
    z, D = torch.full((20_000,), 3.0, dtype=torch.float64), 1.0
    out = []
    sample_ancestral(lambda z, sigma: torch.full_like(z, D), z, torch.tensor([4.0, 2.0, 1.0, 0.0]), random=random,
                     callback=lambda step, sigma, z, _: out.append(z))
    assert out[2].mean().item() == pytest.approx(D + (3.0 - D) * 1 / 16, abs=0.03)
    assert out[2].var().item() == pytest.approx(1.0 - 1 / 16, rel=0.04)


def test_noise_shrinks_along_the_schedule_and_grows_with_the_sign_as_printed():
    sigmas, seen = schedule("karras", 8, NOISE), []
    sample_euler(exact_denoiser, start(), sigmas, callback=lambda step, sigma, z, D: seen.append(z.std().item()))
    assert seen == sorted(seen, reverse=True)
    wrong = start() + (sigmas[0] - sigmas[1]) * (start() - exact_denoiser(start(), sigmas[0])) / sigmas[0]
    assert wrong.std() > start().std()  # the paper's equations 3 to 5 as printed


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_one_reading_at_sigma_max(name):
    levels, z = [], start(3)

    def denoise(z, sigma):
        levels.append(sigma)
        return exact_denoiser(z, sigma)

    out = SAMPLERS[name](denoise, z, schedule("quantile", 1, NOISE), random=lambda step: draws(step, 3))
    assert levels == [NOISE.sigma_max]
    assert torch.equal(out, exact_denoiser(z, NOISE.sigma_max))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_callback_sees_every_step_and_stops(name):
    steps, z = [], start(3)
    arguments = {"random": lambda step: draws(step, 3)}
    SAMPLERS[name](exact_denoiser, z, schedule("quantile", 6, NOISE), **arguments,
                   callback=lambda step, *rest: steps.append(step))
    assert steps == list(range(6))
    stopped = []
    SAMPLERS[name](exact_denoiser, z, schedule("quantile", 6, NOISE), **arguments,
                   callback=lambda step, *rest: stopped.append(step) or step == 2)
    assert stopped == [0, 1, 2]


@pytest.mark.parametrize(("name", "oracle"), [
    ("euler", "EDMEulerScheduler"), ("dpmpp-2m", "EDMDPMSolverMultistepScheduler")])
def test_steps_equal_diffusers(name, oracle):
    diffusers = pytest.importorskip("diffusers")
    sd, options = 0.5, {}
    if name == "dpmpp-2m":
        options = {"solver_order": 2, "final_sigmas_type": "zero", "lower_order_final": True}
    scheduler = getattr(diffusers, oracle)(sigma_min=0.02, sigma_max=10.0, sigma_data=sd, rho=7.0, **options)
    scheduler.set_timesteps(12)
    sigmas = scheduler.sigmas.double()
    torch.testing.assert_close(sigmas, schedule("karras", 12, NOISE), rtol=1e-5, atol=1e-6)
    z = theirs = start(5).float()
    seen = []
    SAMPLERS[name](exact_denoiser, z, sigmas, callback=lambda step, sigma, z, D: seen.append(z))
    for step, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(theirs, seen[step], rtol=2e-4, atol=2e-4)
        sigma = float(sigmas[step])
        # diffusers wants the raw network output F of D = c_skip z + c_out F
        c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / math.sqrt(sigma**2 + sd**2)
        raw = (exact_denoiser(theirs, sigma) - c_skip * theirs) / c_out
        theirs = scheduler.step(raw, t, theirs).prev_sample


def test_bad_schedules_and_missing_noise_are_named():
    with pytest.raises(UserError, match="sigmas must"):
        sample_euler(exact_denoiser, start(2), torch.tensor([1.0, 2.0, 0.0]))
    with pytest.raises(UserError, match="ancestral solver adds noise"):
        sample_ancestral(exact_denoiser, start(2), torch.tensor([2.0, 1.0, 0.0]))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["heun", "ancestral"])
def test_heun_and_ancestral_equal_diffusers(name):
    """Theirs take their levels from a trained schedule; here both walk ours, and predict eps = (z - D) / sigma."""
    diffusers = pytest.importorskip("diffusers")
    sigmas = schedule("karras", 12, NOISE)
    plan, theirs, gen = sigmas.float(), 10 * draws(0, 16).float(), seeded(5)
    if name == "heun":
        scheduler = diffusers.HeunDiscreteScheduler()
        plan = torch.cat([plan[:1], plan[1:-1].repeat_interleave(2), plan[-1:]])
    else:
        scheduler = diffusers.EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(12)
    scheduler.sigmas, scheduler.timesteps = plan, torch.arange(len(plan) - 1).float()
    scheduler.set_begin_index(0)
    scheduler.is_scale_input_called = True
    ours = SAMPLERS[name](exact_denoiser, theirs, sigmas, random=seeded(5))
    for t, sigma in zip(scheduler.timesteps, plan, strict=False):
        eps = (theirs - exact_denoiser(theirs, sigma)) / sigma
        options = {"generator": gen} if name == "ancestral" else {}
        theirs = scheduler.step(eps, t, theirs, **options).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_states_are_float32_even_from_a_bf16_start_and_a_bf16_denoiser(name):
    seen = set()

    def denoise(z, sigma):
        seen.add(z.dtype)
        return exact_denoiser(z, sigma).bfloat16()

    out = SAMPLERS[name](denoise, draws(0, 8).bfloat16(), schedule("karras", 5, NOISE), random=seeded(0))
    assert seen == {torch.float32}
    assert out.dtype == torch.float32


def test_ancestral_without_noise_is_euler():
    sigmas = schedule("quantile", 7, NOISE)
    quiet = sample_ancestral(exact_denoiser, start(9), sigmas, eta=0.0)
    torch.testing.assert_close(quiet, sample_euler(exact_denoiser, start(9), sigmas), rtol=1e-13, atol=1e-13)


def test_restart_has_the_stationary_law_of_its_level():
    """D -> D(D + level eps) is an AR(1) chain with pull p: mean MU, variance p^2 level^2 / (1 - p^2)."""
    level, z = 0.6, start()
    out = sample_restart(exact_denoiser, z, schedule("quantile", 40, NOISE), random=seeded(3), level=level)
    pull = S**2 / (S**2 + level**2)
    deviation = pull * level / math.sqrt(1 - pull**2)
    assert out.mean().item() == pytest.approx(MU, abs=4 * deviation / len(z) ** 0.5)
    assert out.std().item() == pytest.approx(deviation, rel=4 / (2 * len(z)) ** 0.5)


def test_bad_options_and_levels_that_are_no_numbers_are_named():
    sigmas = schedule("karras", 4, NOISE)
    with pytest.raises(UserError, match="eta"):
        sample_ancestral(exact_denoiser, start(2), sigmas, random=seeded(0), eta=1.5)
    with pytest.raises(UserError, match="level"):
        sample_restart(exact_denoiser, start(2), sigmas, random=seeded(0), level=11.0)
    for levels, said in {(math.nan, 0): r"sigmas\[1\] 0 is not below nan", (math.inf, 0): "these run from inf to 0",
                         (3, 2, 2, 0): r"sigmas\[2\] 2 is not below 2", (): "these are empty",
                         (2, 1): "these run from 2 to 1"}.items():
        with pytest.raises(UserError, match=said):
            sample_euler(exact_denoiser, start(2), torch.tensor(levels))


def test_rows_with_one_schedule_are_sampled_as_by_the_ancestral_solver():
    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigmas = torch.tensor([20.0, 7.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    one = sample_ancestral(lambda z, sigma: torch.tanh(z) / (1 + sigma), 20 * z, sigmas,
                           random=lambda step: noise[step])
    rows = sample_rows(lambda z, level: torch.tanh(z) / (1 + level).unsqueeze(-1), 20 * z,
                       sigmas[:-1, None].expand(4, 3), random=lambda step: noise[step])
    torch.testing.assert_close(rows, one)


def test_a_row_whose_level_stays_is_left_alone():
    seen = []
    z, levels = torch.ones(1, 2, 3), torch.tensor([[20.0, 20.0], [0.5, 20.0]], dtype=torch.float64)
    sample_rows(lambda z, level: (seen.append(z), torch.zeros_like(z))[1], z, levels,
                random=lambda step: torch.zeros(1, 2, 3))
    assert torch.equal(seen[1][:, 1], z[:, 1])
    assert not torch.equal(seen[1][:, 0], z[:, 0])
