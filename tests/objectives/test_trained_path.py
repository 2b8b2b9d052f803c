"""Several trained solver steps along the truth, as the bound of text goes, and their number drawn at random."""

import pytest
import torch

from looped.config import load_config
from looped.config.unread_settings import not_read_under
from looped.cost.counts import count
from looped.errors import UserError
from looped.inference import text_denoising
from looped.models.build import build
from looped.objectives import build_objective
from looped.rng import StepRandom, generator

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

V, L, B, DIM = 20, 12, 4, 8
SMALL = {"model.width": 16, "model.num_heads": 2, "denoise.target.dim": DIM, "data.length": L, "denoise.cond_width": 8,
         "evaluation.prompt_length": 4, "denoise.train_steps": 3, "denoise.carry": "latent", "denoise.path": "truth",
         "denoise.noise.share_at_max": 1.0}


def make(**flags):
    config = load_config(None, SMALL | {f"denoise.{name}": value for name, value in flags.items()})
    objective = build_objective(config, build(config, V)).train()
    with torch.no_grad():
        objective.denoiser.carry_proj.weight.normal_(generator=generator("carry"), std=0.3)
    return objective


def tokens():
    return torch.randint(V, (B, L + 1), generator=generator("tokens"))


def watched(objective, monkeypatch):
    """(z, sigma) of every network evaluation."""
    seen, trace = [], objective.denoiser.trace
    monkeypatch.setattr(objective.denoiser, "trace", lambda z, sigma, *args, **kwargs: seen.append((z, sigma)) or trace(
        z, sigma, *args, **kwargs))
    return seen


@torch.no_grad()
def test_z_stays_the_truth_with_noise_of_its_level_and_of_an_estimate_it_does_not(monkeypatch):
    """Over many draws of one step: unit noise at every level, and from step to step the correlation of the chain."""
    for path, true in (("truth", True), ("estimate", False)):
        objective, residuals = make(path=path), []
        seen = watched(objective, monkeypatch)
        target = objective.denoiser.target(tokens()[:, 1:])
        for step in range(60):
            objective(tokens(), StepRandom(0, step, count=B))
            residuals.append([(z - target) / sigma[0].float() for z, sigma in seen])
            seen.clear()
        first, _, last = (torch.stack(each) for each in zip(*residuals, strict=True))
        assert first.std().item() == pytest.approx(1, abs=0.02)
        levels = objective._falling(torch.full((B,), 20.0, dtype=torch.float64), 3)
        assert (abs(last.std().item() - 1) < 0.02) == true, path
        if true:
            correlation = (first * last).mean().item()
            assert correlation == pytest.approx((levels[2] / levels[0]).mean().item(), abs=0.02)


@torch.no_grad()
def test_the_last_readout_of_the_trained_chain_is_that_of_the_bound(monkeypatch):
    """The bound of n steps ends with the loss of its last readout, of the same chain with the same carry: with its
    levels and draws the trained steps give the same."""
    objective, random = make(train_steps=2), StepRandom(0, 0, count=B)
    noise, names = objective.noise, {"noise": "chain0", "noise1": "chain1"}

    class Renamed(StepRandom):
        def normal(self, stream, shape):
            return super().normal(names.get(stream, stream), shape)

    objective._falling = lambda sigma, num: [sigma, torch.full_like(sigma, noise.sigma_min)]
    losses, read = [], objective._read_out
    objective._read_out = lambda *args: losses.append(read(*args)) or losses[-1]
    objective(tokens(), Renamed(0, 0, count=B))
    ends, whole = [], text_denoising.token_losses
    monkeypatch.setattr(text_denoising, "token_losses", lambda *args: ends.append(whole(*args)) or ends[-1])
    text_denoising.bound(objective.eval(), tokens(), 2, random)
    torch.testing.assert_close(losses[-1], ends[-1], rtol=1e-4, atol=1e-5)


def test_without_an_estimate_to_hand_on_a_step_has_one_readout():
    """The logits of an estimate cost a product with the head, forward and twice backward."""
    def flops(**flags):
        config = load_config(None, SMALL | {f"denoise.{name}": value for name, value in flags.items()})
        return count(config, V).step_flops

    assert flops() < flops(path="estimate")
    assert flops(carry="estimate") > flops(carry="none")


def test_the_number_of_trained_steps_is_drawn_evenly_and_alike_for_all_rows(monkeypatch):
    objective, numbers = make(train_steps_drawn=True), []
    seen = watched(objective, monkeypatch)
    for step in range(150):
        objective(tokens()[:2], StepRandom(0, step, start=2 * (step % 2), count=2, total=4))
        numbers.append(len(seen))
        seen.clear()
    assert [objective._trained_steps(StepRandom(0, step, count=2)) for step in range(150)] == numbers
    assert all(30 < numbers.count(num) < 70 for num in (1, 2, 3))


def test_its_cost_is_the_mean_over_the_numbers():
    two, mean = (count(load_config(None, SMALL | flags), V)
                 for flags in ({"denoise.train_steps": 2}, {"denoise.train_steps_drawn": True}))
    assert mean.layer_forwards == two.layer_forwards  # the mean of 1, 2 and 3
    assert mean.step_flops == pytest.approx(two.step_flops, rel=1e-6)


def test_where_they_do_nothing_they_are_refused_or_named():
    with pytest.raises(UserError, match=r"draws from 1 to denoise.train_steps, which is 1; set that to 2 or more"):
        load_config(None, {"denoise.train_steps_drawn": True})
    assert not_read_under(load_config(None, {}), "denoise.path") == "denoise.train_steps 1"
    assert not not_read_under(load_config(None, SMALL), "denoise.path")
