"""NoProp's noise against closed forms: torch.distributions, finite differences, float64."""

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from looped.objectives.local_rules.vp_noise import SCHEDULES, Learned, posterior, prior_divergence


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bent():
    """A learned schedule that has left its straight line."""
    schedule = Learned(-6.0, 5.0)
    torch.nn.init.normal_(schedule.rise, generator=torch.Generator().manual_seed(0))
    torch.nn.init.uniform_(schedule.middle, generator=torch.Generator().manual_seed(1))
    return schedule


MADE = {"cosine": lambda: SCHEDULES["cosine"](-6.0, 5.0), "learned": lambda: SCHEDULES["learned"](-6.0, 5.0),
        "bent": bent}


@pytest.fixture(params=MADE)
def schedule(request):
    return MADE[request.param]()


def test_a_schedule_rises_between_its_ends_with_the_slope_that_it_says(schedule):
    t = torch.linspace(0, 1, 201, dtype=torch.float64, requires_grad=True)
    log_snr = schedule.log_snr(t)
    assert log_snr[[0, -1]].tolist() == pytest.approx([-6.0, 5.0], abs=1e-9)
    assert (log_snr.diff() > 0).all()
    slope, = torch.autograd.grad(log_snr.sum(), t, retain_graph=True)
    torch.testing.assert_close(schedule.slope(t), slope, rtol=1e-10, atol=0)
    snr_slope, = torch.autograd.grad(log_snr.exp().sum(), t)
    torch.testing.assert_close(schedule.snr_slope(t), snr_slope, rtol=1e-10, atol=0)


def test_the_cosine_is_that_of_nichol_and_dhariwal_where_it_is_not_cut():
    """alpha = cos^2 of what is left of a right angle."""
    wide, t = SCHEDULES["cosine"](-60.0, 60.0), torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(wide.log_snr(t).sigmoid(), torch.cos((1 - t) * torch.pi / 2) ** 2, atol=1e-12, rtol=0)


def test_a_bent_schedule_is_not_a_straight_line():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert (bent().log_snr(t) - SCHEDULES["learned"](-6.0, 5.0).log_snr(t)).abs().max() > 0.1


@pytest.mark.parametrize("ends", [(-7.0, -3.0), (-1.0, 0.5), (2.0, 7.0)])
def test_the_posterior_is_that_of_the_joint_gaussian(ends):
    """z_s given z_t is the noising of the paper's equation 5; Bayes' rule by the conditional of a joint Gaussian."""
    early, late = (torch.tensor(end, dtype=torch.float64) for end in ends)
    (alpha_s, alpha_t), u = (end.sigmoid() for end in (early, late)), torch.tensor(1.7, dtype=torch.float64)
    a, b, c = posterior(early, late)
    shared = (alpha_s / alpha_t).sqrt() * (1 - alpha_t)
    joint = MultivariateNormal(torch.stack([alpha_s.sqrt(), alpha_t.sqrt()]) * u,
                               torch.stack([torch.stack([1 - alpha_s, shared]), torch.stack([shared, 1 - alpha_t])]))
    z = torch.tensor(-0.4, dtype=torch.float64)
    gain = shared / (1 - alpha_s)
    mean = joint.mean[1] + gain * (z - joint.mean[0])
    assert (a * u + b * z).item() == pytest.approx(mean.item(), rel=1e-12)
    assert c.item() == pytest.approx((joint.covariance_matrix[1, 1] - gain * shared).item(), rel=1e-9)


@pytest.mark.parametrize("ends", [(-7.0, -3.0), (-1.0, 0.5), (2.0, 7.0)])
def test_half_the_difference_of_snr_times_the_squared_error_is_the_divergence_of_the_two_posteriors(ends):
    """The weight of noprop-dt: KL(q(z_t | z_s, u) || p(z_t | z_s)), whatever z_s is."""
    early, late = (torch.tensor(end, dtype=torch.float64) for end in ends)
    a, b, c = posterior(early, late)
    u, guess, z = double(5), double(5, seed=1), double(5, seed=2)
    truth, model = (Independent(Normal(a * each + b * z, c.sqrt().expand(5)), 1) for each in (u, guess))
    weight = (late.exp() - early.exp()) / 2
    assert kl_divergence(truth, model).item() == pytest.approx((weight * (u - guess).square().sum()).item(), rel=1e-9)
    assert kl_divergence(truth, model).item() != pytest.approx((weight * (u - z).square().sum()).item(), rel=1e-2)


def test_the_divergence_from_the_prior_is_that_of_torch():
    u, log_snr = double(4, 6), torch.tensor(-2.0, dtype=torch.float64)
    noised = Independent(Normal(log_snr.sigmoid().sqrt() * u, (1 - log_snr.sigmoid()).sqrt().expand(4, 6)), 1)
    prior = Independent(Normal(torch.zeros(4, 6, dtype=torch.float64), torch.ones(4, 6, dtype=torch.float64)), 1)
    torch.testing.assert_close(prior_divergence(u, log_snr), kl_divergence(noised, prior), rtol=1e-12, atol=0)


def test_noise_has_the_mean_and_the_variance_of_its_time(schedule):
    u = torch.tensor([[2.0, -1.0]], dtype=torch.float64).expand(40_000, 2)
    t = torch.full((40_000,), 0.4, dtype=torch.float64)
    z, alpha = schedule.noised(u, t, double(40_000, 2)), schedule.log_snr(t[0]).sigmoid().item()
    assert z.mean(0).tolist() == pytest.approx((alpha**0.5 * u[0]).tolist(), abs=0.02)
    assert z.var(0).tolist() == pytest.approx([1 - alpha] * 2, rel=0.03)


def test_the_flow_is_how_a_noisy_class_moves_with_its_own_noise(schedule):
    """The derivative in t of sqrt(alpha) u + sqrt(1 - alpha) eps, for the same u and eps at all times."""
    u, eps, t, h = double(5, 4), double(5, 4, seed=1), torch.linspace(0.01, 0.99, 5, dtype=torch.float64), 1e-6
    moved = (schedule.noised(u, t + h, eps) - schedule.noised(u, t - h, eps)) / (2 * h)
    flow = torch.stack([schedule.flow(z, each, time) for z, each, time in zip(schedule.noised(u, t, eps), u, t,
                                                                              strict=True)])
    torch.testing.assert_close(flow, moved, rtol=1e-6, atol=1e-8)
