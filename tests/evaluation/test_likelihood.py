"""The variational bound of a denoiser: exact where the denoiser is, above the truth where it is not."""

import math

import pytest
import torch

from looped.config import load_config
from looped.evaluation.likelihood import losses_by_depth, losses_by_sigma, losses_by_solver, main_losses
from looped.models.build import build
from looped.objectives import build_objective

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

V = 12
SMALL = {"model.width": 16, "model.num_heads": 2, "denoise.target.dim": 4, "denoise.cond_width": 8,
         "denoise.posterior": True, "denoise.noise.sigma_max": 8.0, "denoise.noise.sigma_min": 0.3}


@pytest.fixture
def exact():
    """An exact denoiser: its network does not see z and answers p(token | context); Bayes' rule adds the rest."""
    config = load_config(None, SMALL)
    objective = build_objective(config, build(config, V))
    torch.nn.init.zeros_(objective.denoiser.in_proj.weight)
    objective.model.embed.weight.data.mul_(6)  # a prior with some shape
    return objective.eval()


def tokens(num=6, length=9):
    return torch.randint(V, (num, length), generator=torch.Generator().manual_seed(1))


def prior_loss(objective, rows):
    """-ln p(token | context) of the exact denoiser, a sequence."""
    z = torch.zeros(len(rows), rows.shape[1] - 1, 4)
    with torch.no_grad():
        logits = objective.logits(rows[:, :-1], z, torch.full((len(rows),), 8.0, dtype=torch.float64))
    return -torch.log_softmax(logits, -1).gather(-1, rows[:, 1:, None])[..., 0].mean(1).double()


@pytest.mark.parametrize("schedule", ["quantile", "karras", "log-linear"])
def test_the_bound_of_an_exact_denoiser_is_the_same_at_every_depth(exact, schedule):
    object.__setattr__(exact.config, "schedule", schedule)
    results = losses_by_depth(exact, tokens(), [1, 2, 5, 33])
    for result in results[1:]:
        torch.testing.assert_close(result.losses, results[0].losses, rtol=1e-4, atol=1e-4)


def test_the_bound_of_an_exact_denoiser_is_the_truth_up_to_the_first_level(exact, unchecked):
    """z_1 still says a little about y, and starts from N(0, sigma_max^2): each is worth at most about
    |y|^2 / (2 sigma_max^2) = 0.03 nats here."""
    rows = tokens(num=4)
    draws = torch.stack([losses_by_depth(exact, rows, [3], seed=seed)[0].losses for seed in range(100)])
    gap = draws.mean(0) - prior_loss(exact, rows)
    assert (gap.abs() < 2 * 4 / (2 * 64) + 3 * draws.std(0) / math.sqrt(100)).all()


def test_what_z_says_of_a_token_at_the_highest_level_is_no_merit_of_the_predictor(exact):
    """At a low sigma_max of 2 z is worth up to |y|^2 / (2 sigma_max^2) = 0.5 nats: the cross-entropy of a network that
    finds all tokens equally likely is below ln V, the figure of the objective is not."""
    exact.model.embed.weight.data.zero_()
    exact.noise.sigma_max, exact.noise.x_max, rows = 2.0, math.log(2), tokens(num=100)
    seen = torch.stack([losses_by_sigma(exact, rows, num_levels=1, seed=seed)[0][1] for seed in range(4)])
    said = torch.stack([main_losses(exact, rows, 1, seed=seed) for seed in range(4)])
    torch.testing.assert_close(said, seen + 0.5)
    error = said.std() / math.sqrt(said.numel())
    assert seen.mean() + 3 * error < math.log(V) < said.mean() + 3 * error


def test_a_denoiser_that_ignores_what_it_sees_pays_for_depth(exact):
    """The positive control: every step goes to where the network did not expect it."""
    exact.denoiser._log_likelihood = lambda z, sigma: torch.zeros(1)
    losses = [result.losses.mean().item() for result in losses_by_depth(exact, tokens(), [1, 4, 16])]
    assert losses[0] + 0.5 < losses[1] < losses[2]


@pytest.mark.parametrize(("trust", "low", "high", "num"), [(1.0, -0.25, 0.25, 200), (3.0, 0.4, math.inf, 50)])
def test_the_bound_lies_above_the_solver_that_it_bounds(exact, trust, low, high, num, unchecked):
    """Hundreds of runs of ancestral solver and sampled bridge: their mean readout is the chain that is bounded, and
    the bound is tight where the denoiser is exact."""
    exact.model.embed.weight.data.div_(5)  # no token so unlikely that the runs never come to it
    for config in (exact.config, exact.denoiser.config):
        for name, value in {"solver": "ancestral", "bridge": "sampled"}.items():
            object.__setattr__(config, name, value)
    honest = exact.denoiser._log_likelihood
    exact.denoiser._log_likelihood = lambda z, sigma: trust * honest(z, sigma)
    rows = tokens(num=2, length=5)
    bound = torch.stack([losses_by_depth(exact, rows, [3], seed=seed)[0].losses for seed in range(20)]).mean()
    sampled = losses_by_solver(exact, rows, [3], num_trajectories=num)[0].losses.mean()
    assert low < (bound - sampled).item() < high
