"""Blocks of several tokens: nothing of a block or after it reaches the block as clean text, the rows of a block see
each other, and a block of one is the plain causal model."""

import pytest
import torch

from looped.config import load_config
from looped.errors import UserError
from looped.evaluation.likelihood import losses_by_depth
from looped.inference.generate import generate
from looped.models.build import build
from looped.nn.masks import CleanNoisy, CleanNoisyBlocks
from looped.objectives import build_objective
from looped.rng import StepRandom

V, K, L = 40, 3, 12
SMALL = {"model.width": 16, "model.num_heads": 2, "denoise.target.dim": 8, "denoise.cond_width": 8, "data.length": L,
         "denoise.context": "context", "evaluation.prompt_length": 4}


def make(**flags):
    config = load_config(None, SMALL | {name.replace("__", "."): value for name, value in flags.items()})
    objective = build_objective(config, build(config, V)).double()
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if "modulation" in name or "place" in name:  # start at zero, where nothing depends on the level or place
                parameter.normal_(std=0.3)
    return objective


def inputs():
    gen = torch.Generator().manual_seed(0)
    x = torch.randint(V, (2, L), generator=gen)
    z = torch.randn(2, L, 8, generator=gen, dtype=torch.float64)
    return x, z, torch.full((2,), 2.0, dtype=torch.float64)


def changed(before, after):
    return ((before - after).abs().amax((0, 2)) > 1e-9).tolist()


@torch.no_grad()
@pytest.mark.parametrize("context", ["context", "concat"])
def test_a_clean_token_reaches_the_blocks_after_it_alone(context):
    objective = make(denoise__context=context, denoise__block_size=K)
    x, z, sigma = inputs()
    other = x.clone()
    other[:, 4] = (other[:, 4] + 1) % V  # row 4 lies in block 1, whose rows 3, 4, 5 seek tokens 4, 5, 6
    moved = changed(objective.logits(x, z, sigma), objective.logits(other, z, sigma))
    assert moved == [row >= 6 for row in range(L)]  # the last half is the positive control


@torch.no_grad()
@pytest.mark.parametrize("context", ["context", "concat"])
def test_a_noisy_row_reaches_its_own_block_and_no_other(context):
    objective = make(denoise__context=context, denoise__block_size=K)
    x, z, sigma = inputs()
    moved = changed(objective.logits(x, z, sigma), objective.logits(x, z + torch.eye(L)[4].view(1, L, 1), sigma))
    assert moved == [3 <= row < 6 for row in range(L)]


@torch.no_grad()
def test_blocks_of_one_row_are_clean_noisy():
    torch.testing.assert_close(CleanNoisyBlocks(4, 1).dense(1, 8, 8), CleanNoisy(4).dense(1, 8, 8))


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="needs the clean tokens"):
        load_config(None, {"denoise.block_size": 2, "denoise.context": "inject"})
    with pytest.raises(UserError, match="several tokens"):
        load_config(None, {"denoise.order": "left-to-right"})
    with pytest.raises(UserError, match="set it to ancestral"):
        load_config(None, {"denoise.order": "left-to-right", "denoise.block_size": 2, "denoise.solver": "euler"})
    with pytest.raises(UserError, match="needs an injection"):
        load_config(None, {"denoise.block_size": 2, "model.injection": "none"})
    with pytest.raises(UserError, match="try 120"):
        load_config(None, {"denoise.block_size": 6, "denoise.context": "concat", "data.length": 125})
    with pytest.raises(UserError, match="try a length of 9"):
        CleanNoisyBlocks(10, 3)


@torch.no_grad()
def test_evidence_in_reads_a_row_that_gives_its_token_away_as_that_token():
    objective = make(denoise__evidence_in=True, denoise__block_size=K)
    denoiser, y = objective.denoiser, inputs()[0]
    low, high = (torch.full((2,), level, dtype=torch.float64) for level in (1e-2, 1e4))
    z = denoiser.target(y).double()
    clear = denoiser.expected_embedding(z, denoiser.at(z, low))
    embedding = 4.0 * objective.model.embed.weight  # sqrt(width), as in the prelude
    torch.testing.assert_close(clear, embedding[y], rtol=1e-6, atol=1e-6)
    noise = 1e4 * inputs()[1]
    blind = denoiser.expected_embedding(noise, denoiser.at(noise, high))
    torch.testing.assert_close(blind, embedding.mean(0).expand(2, L, 16), rtol=0, atol=1e-2)


def test_from_left_to_right_training_meets_what_the_solver_meets():
    objective = make(denoise__block_size=K, denoise__order="left-to-right")
    sigma = objective.levels(StepRandom(0, 0, count=200), L).view(-1, K)
    low, high = objective.noise.sigma_min, objective.noise.sigma_max
    at_work = (sigma == low).cumprod(1).sum(1).clamp_max(K - 1)  # the first row that is not done
    place = torch.arange(K)
    assert bool((sigma[place > at_work.unsqueeze(1)] == high).all())
    shares = torch.bincount(at_work, minlength=K) / len(sigma)
    torch.testing.assert_close(shares, torch.full((K,), 1 / K), atol=0.08, rtol=0)
    own = sigma.gather(1, at_work.unsqueeze(1))
    assert (own == high).double().mean().item() == pytest.approx(0.75, abs=0.06)  # noise.share_at_max
    assert float(own[own < high].min()) < 1 < float(own[own < high].max())


@torch.no_grad()
def test_a_block_from_left_to_right_is_written_and_measured_at_any_depth():
    objective = make(denoise__block_size=K, denoise__order="left-to-right")
    x = inputs()[0]
    losses = losses_by_depth(objective, torch.cat([x, x[:, :1]], dim=1), [1, 2, 3, 7])
    assert all(bool(result.losses.isfinite().all()) for result in losses)
    assert len({round(result.losses.sum().item(), 6) for result in losses}) == 4
    assert generate(objective, x[:, :4], num_tokens=5, depth=7).shape == (2, 5)
