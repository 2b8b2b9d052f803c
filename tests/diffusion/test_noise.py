"""Noise distributions against scipy, what the adaptive one learns, and the split of the levels among blocks."""

import math
import os
from functools import partial

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from looped.config.denoise import NOISE_PRESETS, NoiseConfig
from looped.diffusion.noise import (
    Adaptive,
    LogNormal,
    LogUniform,
    Noise,
    ShareAtMax,
    block_of,
    interval,
    isotonic,
    partition,
)
from looped.diffusion.noise_from_config import noise_from_config
from looped.errors import UserError
from looped.rng import StepRandom

RANGE = (0.002, 80.0)
SETTINGS = [(-1.2, 1.2, 0.002, 80.0), (0.7, 1.2, 0.5, 20.0), (8.0, 1.0, 0.5, 20.0), (-9.0, 1.0, 0.5, 20.0)]


def loss_curve(x):
    """A made-up cross-entropy: it climbs from 0 to 6 nats around ln sigma = 0.5."""
    return 6 / (1 + torch.exp(-(x - 0.5) / 0.4))


def trained(num_updates: int = 200, share: float = 0.0, noise_std: float = 0.0, **options) -> Noise:
    noise = ShareAtMax(Adaptive(0.05, 20.0, **options), share)
    for step in range(num_updates):
        random = StepRandom(0, step, count=32)
        sigma = noise.sample(random.stratified("sigma"))
        jitter = noise_std * random.normal("jitter", ()).double()
        noise.observe(sigma.float(), (loss_curve(sigma.log()) + jitter).float())
        noise.update()
    return noise


EVERY_DISTRIBUTION = [lambda: LogUniform(*RANGE), *(partial(LogNormal, *setting) for setting in SETTINGS),
                      lambda: Adaptive(*RANGE), lambda: trained().continuous]


def scipy_twin(setting):
    mean, std, low, high = setting
    return stats.truncnorm((math.log(low) - mean) / std, (math.log(high) - mean) / std, loc=mean, scale=std)


@pytest.mark.parametrize("setting", SETTINGS)
def test_log_normal_is_scipys_truncated_normal_in_ln_sigma(setting):
    noise, twin = LogNormal(*setting), scipy_twin(setting)
    q = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    x = noise.quantile(q).log()
    np.testing.assert_allclose(x, twin.ppf(q), rtol=0, atol=1e-9)
    np.testing.assert_allclose(noise.cdf(x.exp()), twin.cdf(x), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(noise.log_density(x.exp()), twin.logpdf(x), rtol=0, atol=1e-8)


def test_log_uniform_is_scipys():
    noise, twin = LogUniform(*RANGE), stats.loguniform(*RANGE)
    q = torch.linspace(0, 1, 101, dtype=torch.float64)
    sigma = noise.quantile(q)
    np.testing.assert_allclose(sigma, twin.ppf(q), rtol=1e-13)
    np.testing.assert_allclose(noise.cdf(sigma), twin.cdf(sigma), atol=1e-13)
    np.testing.assert_allclose(noise.log_density(sigma) - sigma.log(), twin.logpdf(sigma), atol=1e-12)


@pytest.mark.parametrize("index", range(7))
def test_quantile_inverts_cdf_and_the_ends_are_exact(index):
    noise = EVERY_DISTRIBUTION[index]()
    q = torch.linspace(0, 1, 201, dtype=torch.float64)
    sigma = noise.quantile(q)
    assert sigma[0].item() == noise.sigma_min
    assert sigma[-1].item() == noise.sigma_max
    assert (sigma.diff() > 0).all()
    torch.testing.assert_close(noise.cdf(sigma), q, rtol=0, atol=1e-9)
    outside = torch.tensor([noise.sigma_min / 2, noise.sigma_max * 2])
    assert noise.cdf(outside).tolist() == [0, 1]
    assert (noise.log_density(outside) == -math.inf).all()


@pytest.mark.parametrize("index", range(7))
def test_density_integrates_to_the_cdf(index):
    noise = EVERY_DISTRIBUTION[index]()
    x = torch.linspace(noise.x_min, noise.x_max, 320_001, dtype=torch.float64)
    total = integrate.cumulative_simpson(noise.log_density(x.exp()).exp().numpy(), x=x.numpy(), initial=0)
    np.testing.assert_allclose(total, noise.cdf(x.exp()), atol=2e-4)


@pytest.mark.parametrize("setting", SETTINGS[:2])
def test_stratified_samples_follow_the_distribution(setting):
    sigma = LogNormal(*setting).sample(StepRandom(3, 0, count=4096).stratified("sigma"))
    assert sigma.dtype == torch.float64
    distance = stats.kstest(sigma.log().numpy(), scipy_twin(setting).cdf).statistic
    assert distance <= 1 / 4096  # one sample a stratum; independent draws would be near 0.87 / sqrt(4096)
    assert stats.kstest(sigma.log().numpy(), stats.norm(*setting[:2]).cdf).statistic > 1 / 4096 or setting[2] < 0.01


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_share_at_max_puts_that_share_exactly_at_sigma_max(share):
    inner = LogUniform(0.5, 20.0)
    noise = ShareAtMax(inner, share)
    sigma = noise.sample(StepRandom(0, 0, count=64).stratified("sigma"))
    at_max = sigma == 20.0
    assert at_max.sum().item() == 64 * share
    if share < 1:
        rest = sigma[~at_max].numpy()
        assert stats.kstest(rest, stats.loguniform(0.5, 20.0).cdf).statistic <= 1 / len(rest)
    assert noise.cdf(20.0).item() == 1
    assert noise.cdf(19.999999).item() == pytest.approx(1 - share, abs=1e-7)
    assert (noise.quantile(torch.tensor([1 - share + 1e-9, 1.0])) == 20.0).all()
    below = torch.tensor([0.1, 0.6, 0.99], dtype=torch.float64) * (1 - share)
    torch.testing.assert_close(noise.cdf(noise.quantile(below)), below)
    assert math.exp(noise.log_density(1.0)) == pytest.approx((1 - share) * math.exp(inner.log_density(1.0)))


def test_adaptive_is_log_uniform_before_it_has_seen_enough():
    q = torch.linspace(0, 1, 33, dtype=torch.float64)
    noise, uniform = Adaptive(0.05, 20.0), LogUniform(0.05, 20.0)
    torch.testing.assert_close(noise.quantile(q), uniform.quantile(q))
    sigma = torch.tensor([0.1, 10.0])
    noise.observe(sigma, sigma)
    noise.update()
    torch.testing.assert_close(noise.quantile(q), uniform.quantile(q))


@pytest.mark.parametrize(("share", "noise_std", "bound"), [(0.0, 0.0, 0.02), (0.5, 0.0, 0.02), (0.5, 0.3, 0.04)])
def test_adaptive_puts_equal_change_of_cross_entropy_in_equal_mass(share, noise_std, bound):
    noise = trained(400, share, noise_std).continuous
    x = torch.linspace(noise.x_min, noise.x_max, 1001, dtype=torch.float64)
    loss = loss_curve(x)
    exact = 0.9 * (loss - loss[0]) / (loss[-1] - loss[0]) + 0.1 * torch.linspace(0, 1, 1001).double()
    assert (noise.cdf(x.exp()) - exact).abs().max() < bound
    log_uniform = LogUniform(0.05, 20.0).cdf(x.exp())
    assert (log_uniform - exact).abs().max() > 5 * bound  # positive control: it had something to learn


def test_adaptive_keeps_a_floor_in_every_bin_and_survives_a_flat_or_falling_loss():
    mass = trained().continuous.node_cdf().diff()
    assert mass.min() >= 0.1 / 32 - 1e-12
    for slope in (0.0, -1.0):
        noise = Adaptive(0.05, 20.0, min_count=0)
        sigma = noise.quantile(torch.linspace(0, 1, 64, dtype=torch.float64))
        noise.observe(sigma, slope * sigma.log())
        noise.update()
        torch.testing.assert_close(noise.node_cdf(), torch.linspace(0, 1, 33, dtype=torch.float64))


def test_adaptive_follows_a_loss_that_changes():
    noise = trained(300).continuous
    before = noise.quantile(0.5).item()
    for step in range(600):
        sigma = noise.sample(StepRandom(1, step, count=32).stratified("sigma"))
        noise.observe(sigma, loss_curve(sigma.log() - 1))
        noise.update()
    assert noise.quantile(0.5).log().item() - math.log(before) == pytest.approx(1, abs=0.15)


def test_adaptive_ignores_losses_that_are_not_finite():
    noise = trained(20).continuous
    before = noise.cross_entropy()
    noise.observe(torch.ones(3), torch.tensor([math.nan, math.inf, -math.inf]))
    noise.update()
    torch.testing.assert_close(noise.cross_entropy(), before)


def test_adaptive_does_not_depend_on_how_a_step_is_split_into_micro_batches():
    whole, split = Adaptive(0.05, 20.0), Adaptive(0.05, 20.0)
    sigma = whole.sample(StepRandom(0, 0, count=32).stratified("sigma"))
    loss = loss_curve(sigma.log())
    whole.observe(sigma, loss)
    for part in range(4):
        split.observe(sigma[part * 8 : part * 8 + 8], loss[part * 8 : part * 8 + 8])
        assert split.num_seen.sum() == 0  # micro-batches of one step see one distribution
    whole.update()
    split.update()
    torch.testing.assert_close(whole.state_dict(), split.state_dict(), rtol=1e-13, atol=1e-13)


def test_adaptive_resumes_bit_for_bit():
    first, resumed = trained(40, 0.5, 0.3), ShareAtMax(Adaptive(0.05, 20.0), 0.5)
    resumed.load_state_dict(first.state_dict())
    for step in range(40, 60):
        uniform = StepRandom(0, step, count=32).stratified("sigma")
        for noise in (first, resumed):
            sigma = noise.sample(uniform)
            noise.observe(sigma, loss_curve(sigma.log()))
            noise.update()
    torch.testing.assert_close(first.state_dict(), resumed.state_dict(), rtol=0, atol=0)
    assert torch.equal(first.sample(uniform), resumed.sample(uniform))


def _observe_half(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    noise = Adaptive(0.05, 20.0, min_count=0.1)
    for step in range(3):
        sigma = noise.sample(StepRandom(0, step, start=rank * 64, count=64, total=128).stratified("sigma"))
        noise.observe(sigma, loss_curve(sigma.log()))
        noise.update()
    torch.save(noise.state_dict(), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_learn_what_one_would(tmp_path):
    torch.multiprocessing.spawn(_observe_half, (os.fspath(tmp_path),), nprocs=2)
    one = Adaptive(0.05, 20.0, min_count=0.1)
    for step in range(3):
        sigma = one.sample(StepRandom(0, step, count=128).stratified("sigma"))
        one.observe(sigma, loss_curve(sigma.log()))
        one.update()
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    torch.testing.assert_close(states[0], dict(one.state_dict()), rtol=1e-12, atol=1e-12)
    assert not torch.equal(one.node_cdf(), torch.linspace(0, 1, 33, dtype=torch.float64))  # it did learn


def test_isotonic_is_scipys():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values, weights = rng.normal(size=33), rng.exponential(size=33)
        expected = optimize.isotonic_regression(values, weights=weights).x
        np.testing.assert_allclose(isotonic(torch.tensor(values), torch.tensor(weights)), expected, atol=1e-12)


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 8])
@pytest.mark.parametrize("index", range(7))
def test_blocks_have_equal_mass_and_own_what_lies_between_their_edges(num_blocks, index):
    noise = EVERY_DISTRIBUTION[index]()
    edges = partition(noise, num_blocks)
    assert edges.shape == (num_blocks + 1,)
    assert edges[0].item() == noise.sigma_max
    assert edges[-1].item() == noise.sigma_min
    assert (edges.diff() < 0).all()
    for block in range(num_blocks):
        high, low = edges[block], edges[block + 1]
        inside = (high.log() * 0.3 + low.log() * 0.7).exp()
        for dtype in (torch.float64, torch.float32):
            assert block_of(inside.to(dtype), edges) == block
            assert block_of(high.to(dtype), edges) == block  # a solver that starts at an edge uses the block below it
        x = np.linspace(low.log().item(), high.log().item(), 4_001)
        density = noise.log_density(torch.from_numpy(x).exp().clamp(low, high)).exp().numpy()
        assert integrate.simpson(density, x=x) == pytest.approx(1 / num_blocks, abs=2e-3)
    assert block_of(edges[-1], edges) == num_blocks - 1
    assert block_of(torch.tensor([1e-9, 1e9]), edges).tolist() == [num_blocks - 1, 0]


def test_edges_are_the_papers_formula():
    noise = noise_from_config(NoiseConfig(**NOISE_PRESETS["paper"]))
    at_min, at_max = stats.norm.cdf([(math.log(s) + 1.2) / 1.2 for s in RANGE])
    expected = np.exp(-1.2 + 1.2 * stats.norm.ppf(np.linspace(at_max, at_min, 5)))
    np.testing.assert_allclose(partition(noise, 4), expected, rtol=1e-9)


def test_block_0_owns_the_highest_noise():
    """The order once ran inverted between training and evaluation, unnoticed."""
    edges = partition(LogUniform(*RANGE), 4)
    levels = torch.tensor([79.0, 1.0, 0.1, 0.003])
    assert block_of(levels, edges).tolist() == [0, 1, 2, 3]
    inverted = torch.bucketize(levels.double(), edges.flip(0)[1:-1])  # positive control: count from the clean end
    assert inverted.tolist() == [3, 2, 1, 0]


def test_float32_edges_would_change_block_without_the_common_rounding():
    edges = torch.tensor([80.0, 0.1, 0.002], dtype=torch.float64)
    assert torch.tensor(0.1).double() > 0.1  # float32 rounds 0.1 up: compared in float64 it would be block 0
    assert block_of(torch.tensor(0.1), edges) == 1


def test_an_atom_does_not_move_the_edges():
    inner = LogUniform(0.5, 20.0)
    assert torch.equal(partition(ShareAtMax(inner, 0.5), 3), partition(inner, 3))


def test_intervals_overlap_by_a_power_of_their_ratio_and_stay_in_range():
    edges = torch.tensor([64.0, 8.0, 2.0, 0.25], dtype=torch.float64)
    assert interval(1, edges) == (2.0, 8.0)
    a = (8.0 / 2.0) ** 0.1
    assert interval(1, edges, 0.1) == pytest.approx((2.0 / a, 8.0 * a))
    assert interval(0, edges, 0.1) == pytest.approx((8.0 / 8.0**0.1, 64.0))
    assert interval(2, edges, 0.1) == pytest.approx((0.25, 2.0 * 8.0**0.1))
    for bad in (-1, 3):
        with pytest.raises(UserError, match="block"):
            interval(bad, edges)
    with pytest.raises(UserError, match="overlap"):
        interval(0, edges, -0.1)


@pytest.mark.parametrize(("settings", "kind", "share"), [
    ({}, LogUniform, 0.75),
    (NOISE_PRESETS["paper"], LogNormal, 0.0),
    ({"distribution": "adaptive", "share_at_max": 0.25}, Adaptive, 0.25),
])
def test_the_config_builds_what_it_says(settings, kind, share):
    config = NoiseConfig(**settings)
    noise = noise_from_config(config)
    assert isinstance(noise.continuous, kind)
    assert getattr(noise, "share", 0.0) == share
    assert (noise.sigma_min, noise.sigma_max) == (config.sigma_min, config.sigma_max)


def test_only_the_adaptive_distribution_has_state():
    assert not ShareAtMax(LogUniform(*RANGE), 0.5).state_dict()
    assert len(ShareAtMax(Adaptive(*RANGE), 0.5).state_dict()) == 3


@pytest.mark.parametrize(("build", "word"), [
    (lambda: LogUniform(2.0, 1.0), "sigma_min"),
    (lambda: LogNormal(1e4, 1.2, 0.5, 20.0), "log_mean"),
    (lambda: ShareAtMax(LogUniform(1.0, 2.0), 1.5), "share_at_max"),
    (lambda: Adaptive(1.0, 2.0, floor=0.0), "floor"),
    (lambda: partition(LogUniform(1.0, 2.0), 0), "num_blocks"),
    (lambda: Adaptive(1.0, 2.0).observe(torch.ones(2), torch.ones(2, 1)), "cross_entropy"),
])
def test_bad_settings_are_named(build, word, unchecked):
    with pytest.raises(UserError, match=word):
        build()
