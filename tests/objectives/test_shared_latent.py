"""Blocks that share a latent: each trains alone, on the output of the blocks above it."""

import itertools

import pytest
import torch

from looped.config import load_config
from looped.diffusion.denoiser import Trajectory
from looped.errors import UserError
from looped.models.build import build
from looped.nn.rows import Rows
from looped.objectives import build_objective
from looped.objectives.base import rows_of_batch
from looped.objectives.denoise import reads_first
from looped.rng import StepRandom, generator

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

V, L, B, N = 20, 12, 4, 3
SMALL = {"objective": "blockwise", "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 4, "blocks.num": N,
         "blocks.layers": [1, 2, 1], "denoise.target.dim": 8, "denoise.cond_width": 8, "data.length": L,
         "evaluation.prompt_length": 4, "denoise.carry": "latent"}
CONTEXTS = ["context", "concat"]


def make(**flags):
    config = load_config(None, SMALL | flags)
    objective = build_objective(config, build(config, V)).train()
    with torch.no_grad():  # zero at first: it would hide the carry, and the level
        for name, parameter in objective.named_parameters():
            if "modulation" in name or "carry_proj" in name:
                parameter.normal_(generator=generator(name), std=0.2)
    return objective


def tokens():
    return torch.randint(V, (B, L + 1), generator=generator("tokens"))


def step_of(objective, block, latent=True):
    """A step in which this block is active, and has a latent or not."""
    return next(step for step in range(60) if objective.sample_block(StepRandom(0, step, count=1)) == block
                and reads_first(StepRandom(0, step, count=B)) == latent)


def loss_of(objective, block, latent=True):
    return objective(tokens(), StepRandom(0, step_of(objective, block, latent), count=B))


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_active_block_alone_gets_a_gradient(context):
    for block in range(N):
        objective = make(**{"denoise.context": context, "blocks.shared": "frozen"})
        loss_of(objective, block).value.backward()
        for number, other in enumerate(objective.model.recurrence.core.blocks):
            assert all((p.grad is not None) == (number == block) for p in other.parameters())


@pytest.mark.parametrize("latent", [True, False])
def test_a_block_hears_the_blocks_above_it_and_none_below_and_in_half_of_the_steps_none(latent):
    for block in range(N):
        objective = make()
        before = loss_of(objective, block, latent).value.item()
        for number, other in enumerate(objective.model.recurrence.core.blocks):
            if number != block:
                with torch.no_grad():
                    for parameter in other.parameters():
                        parameter.mul_(1.5)
                heard = loss_of(objective, block, latent).value.item() != before
                assert heard == (latent and number < block)
                before = loss_of(objective, block, latent).value.item()


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_latent_is_what_a_solver_of_one_step_per_block_hands_on(monkeypatch, context):
    """The trained block starts from the same carry as the solver, which visits the same z at the same levels."""
    objective = make(**{"denoise.context": context})
    above, trained, passed_on, trace = [], [], objective.denoiser.passed_on, objective.denoiser.trace
    monkeypatch.setattr(objective.denoiser, "passed_on", lambda z, sigma, *args, **kwargs: above.append(
        (z, sigma)) or passed_on(z, sigma, *args, **kwargs))
    monkeypatch.setattr(objective.denoiser, "trace", lambda *args, carry: trained.append((*args[:2], carry)) or trace(
        *args, carry=carry))
    with torch.no_grad():
        loss_of(objective, N - 1)
        batch = objective.ask(tokens())
        e, solver = objective.model.encode(batch.inputs, Rows()), Trajectory(objective.denoiser)
        assert len(above) == N - 1
        for block, (z, sigma) in enumerate(above):
            rows = objective.noisy_rows(e, batch, rows_of_batch(batch).having(block=block))
            assert objective.denoiser.owners(sigma).tolist() == [block] * B
            solver(z, sigma, e, rows)
    (_, _, carry), = trained
    torch.testing.assert_close(carry, solver.carry)


@torch.no_grad()
def test_z_of_the_trained_block_is_the_truth_with_noise_of_its_level(monkeypatch):
    objective, residuals = make(), []
    trace = objective.denoiser.trace
    target = objective.denoiser.target(tokens()[:, 1:])
    monkeypatch.setattr(objective.denoiser, "trace", lambda z, sigma, *args, **kwargs: residuals.append(
        (z - target) / sigma.float().view(-1, 1, 1)) or trace(z, sigma, *args, **kwargs))
    for step in range(150):
        objective(tokens(), StepRandom(0, step, count=B))
    noise = torch.stack(residuals)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)


@torch.no_grad()
def test_the_blocks_above_and_the_trained_one_see_one_path_of_z(monkeypatch):
    """The noises of two levels share what is left of the higher one: their covariance is the square of the lower level,
    so that divided by it they have the ratio of the levels as their correlation. Drawn anew it would be 0."""
    objective, seen = make(), []
    target = objective.denoiser.target(tokens()[:, 1:])
    def recorded(run):
        return lambda z, sigma, *args, **kwargs: seen.append(
            (z - target, sigma.float().view(-1, 1, 1))) or run(z, sigma, *args, **kwargs)

    for name in ("passed_on", "trace"):
        monkeypatch.setattr(objective.denoiser, name, recorded(getattr(objective.denoiser, name)))
    ratios, expected = [], []
    for step in range(300):
        seen.clear()
        objective(tokens(), StepRandom(0, step, count=B))
        for (high, upper), (low, lower) in itertools.pairwise(seen):
            ratios.append((high / upper * low / lower).mean())
            expected.append((lower / upper).mean())
    assert len(ratios) > 100
    assert torch.stack(ratios).mean().item() == pytest.approx(torch.stack(expected).mean().item(), abs=0.02)
    assert torch.stack(expected).mean() > 0.1


def test_levels_fall_where_intervals_overlap():
    objective = make(**{"blocks.overlap": 0.4})
    for step in range(40):
        levels = torch.stack(objective._levels_down_to(
            N - 1, objective.levels_of(N - 1, random := StepRandom(0, step, count=B)), random))
        assert (levels[:-1] >= levels[1:]).all()


@pytest.mark.parametrize("context", CONTEXTS)
def test_layer_forwards_count_the_blocks_above(context):
    """Calls of all layers in one step of each block, of which those with gradient count three. Under concat clean rows
    need no more of the coda's last layer than its keys and values, which count nothing."""
    objective, calls = make(**{"denoise.context": context, "blocks.shared": "trained"}), []

    def count(layer, args, output):
        calls.append(3.0 if torch.is_grad_enabled() else 1.0)

    layers = [*objective.model.prelude, *objective.model.coda,  # one each
              *(layer for block in objective.model.recurrence.core.blocks for layer in block.layers)]
    for layer in layers:
        layer.register_forward_hook(count)
    counted = 0.0
    for block, share in enumerate(objective.shares.tolist()):
        for latent in (True, False):
            loss_of(objective, block, latent)
            counted += share * sum(calls) / 2
            calls.clear()
    assert objective.layer_forwards() == pytest.approx(counted)
    assert objective.layer_forwards() > make(**{"denoise.context": context, "denoise.carry": "none"}).layer_forwards()


def test_costs_are_counted_for_every_number_of_blocks_above():
    found = [(made["block"], made["first reading"], weight) for weight, made in make().decisions()]
    assert sorted(found) == [(block, first, pytest.approx(1 / 6)) for block in range(3) for first in (False, True)]
    assert len(make(**{"denoise.carry": "none"}).decisions()) == 2  # blocks 0 and 2 have one layer each


def test_a_block_trained_alone_has_no_latent_to_start_from():
    with pytest.raises(UserError, match=r"denoise\.carry latent gives a block the output of those above it"):
        load_config(None, SMALL | {"blocks.alone": 1, "blocks.shared": "frozen"})
