"""What blocks of tokens are for: an exact denoiser of pairs, whose bound falls with depth from the entropy of their
marginals to that of the pair."""

import itertools
import math

import pytest
import torch

from looped.config import load_config
from looped.diffusion.edm import align
from looped.evaluation.likelihood import losses_by_depth
from looped.models.language import LanguageModel, Structure
from looped.nn.cache import Cache
from looped.objectives import build_objective
from looped.rng import generator


class Pairs(LanguageModel):
    """The exact network for blocks of two tokens of a known joint probability that the clean tokens before them say
    nothing about. The denoiser adds ln p(z | token) of each row's own z; what is left for the network to say of
    row 1 is ln sum_v joint[:, v] p(z_2 | v), which is p(token 1 | z_2), and of row 2 the same of row 1."""

    def __init__(self, config, joint):
        super().__init__(config.model, len(joint), Structure(cond_width=config.denoise.cond_width))
        self.log_joint, self.table = joint.log(), None

    def encode(self, tokens, rows=None):
        return torch.zeros(*tokens.shape, self.width)

    def make_context(self, e, kind, rows=None):
        return Cache()

    def step(self, state, e, level=None, rows=None):
        """The state is c_in z, and the level c_noise: from both, z / sigma^2."""
        sigma = align((4 * level).exp(), state)
        return state * (sigma.square() + 1).sqrt() / sigma.square()  # sigma_data is 1

    def decode(self, state, rows=None):
        first, second = (state @ self.table.T).unflatten(1, (-1, 2)).unbind(2)  # B (N 2) V -> B N V
        answers = [torch.logsumexp(self.log_joint + second.unsqueeze(-2), -1),
                   torch.logsumexp(self.log_joint + first.unsqueeze(-1), -2)]
        return torch.stack(answers, 2).flatten(1, 2)


def exact_pairs(joint, order, width=8):
    config = load_config(None, {"model.width": width, "model.num_heads": 2, "denoise.target.dim": width,
                                "denoise.block_size": 2, "denoise.noise.sigma_max": 40.0,
                                "denoise.noise.sigma_min": 0.3, "denoise.cond_width": 8, "denoise.order": order})
    model = Pairs(config, joint)
    objective = build_objective(config, model)
    with torch.no_grad():
        objective.denoiser.in_proj.weight.copy_(torch.eye(width))
        objective.denoiser.targets.weight.copy_(torch.randn(len(joint), width, generator=generator("table")))
    model.table = objective.denoiser.table().detach()
    return objective.eval()


def pair_bounds(joint, rows, depths, order="together"):
    """{depth: nats a pair by the variational bound}."""
    return {found.depth: 2 * found.losses.mean().item()
            for found in losses_by_depth(exact_pairs(joint, order), rows, depths, batch_size=len(rows))}


def bound_pairs(num_tokens=6, agree=0.9):
    """(joint, sequences of pairs drawn from it): the second token is the first plus one, in nine pairs of ten."""
    joint = torch.full((num_tokens, num_tokens), (1 - agree) / (num_tokens - 1) / num_tokens)
    joint[torch.arange(num_tokens), (torch.arange(num_tokens) + 1) % num_tokens] = agree / num_tokens
    cells = torch.multinomial(joint.flatten(), 64 * 20, replacement=True, generator=generator("pairs"))
    pairs = torch.stack([cells // num_tokens, cells % num_tokens], -1).view(64, 40)
    return joint, torch.cat([torch.zeros(64, 1, dtype=torch.long), pairs], 1)


def test_the_bound_of_an_exact_denoiser_of_pairs_falls_from_their_marginals_entropy_to_that_of_the_pair():
    """One step draws both tokens of a pair apart; many small ones, each of which sees where the other is, do not."""
    joint, rows = bound_pairs()
    first, second = rows[:, 1:].unflatten(1, (-1, 2)).unbind(2)
    truth = -joint[first, second].log().mean().item()  # 2.27 nats a pair; apart, 3.58
    bounds = pair_bounds(joint, rows, [1, 2, 4, 8, 16, 32, 64, 128])
    assert bounds[1] == pytest.approx(2 * math.log(6), abs=0.01)
    assert bounds[2] == pytest.approx(bounds[1], abs=0.01)  # it still leaves sigma_max for both tokens apart
    assert all(later < earlier - 0.01 for earlier, later in itertools.pairwise(list(bounds.values())[1:]))
    assert min(bounds.values()) > truth
    assert bounds[128] - truth < 0.6 * (bounds[64] - truth) < 0.6 * 0.06  # a gap of 1 / depth, with nothing below it


def test_the_bound_of_a_denoiser_that_takes_the_tokens_of_a_pair_for_independent_is_the_same_at_any_depth():
    """The control: what falls is what the tokens of a block say of each other."""
    joint, rows = bound_pairs()
    apart = joint.sum(1, keepdim=True) * joint.sum(0)
    bounds = pair_bounds(apart, rows, [1, 2, 8, 64])
    assert max(bounds.values()) - min(bounds.values()) < 1e-3
    assert bounds[1] == pytest.approx(2 * math.log(6), abs=0.01)


def test_from_left_to_right_an_exact_denoiser_of_pairs_needs_one_step_a_token():
    joint, rows = bound_pairs()
    first, second = rows[:, 1:].unflatten(1, (-1, 2)).unbind(2)
    truth = -joint[first, second].log().mean().item()
    bounds = pair_bounds(joint, rows, [1, 2, 8], order="left-to-right")
    assert bounds[1] == pytest.approx(2 * math.log(6), abs=0.01)
    assert bounds[2] == pytest.approx(truth, abs=0.02)
    assert bounds[8] == pytest.approx(truth, abs=0.02)
