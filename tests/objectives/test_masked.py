"""Masked diffusion: the loss by hand and its mean by enumeration, no leak, one block a step, refusals in a sentence."""

import itertools

import numpy as np
import pytest
import torch

from looped.config import load_config
from looped.diffusion.masking import SCHEDULES, hide, level, weight
from looped.errors import UserError
from looped.models.build import build
from looped.objectives import MaskedBlocks, build_objective
from looped.objectives.base import token_losses
from looped.objectives.masked import TOGETHER
from looped.rng import StepRandom

V, L, N = 5, 3, 3
SMALL = {"objective": "masked", "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 3,
         "masked.cond_width": 8, "data.length": 16, "evaluation.prompt_length": 4}
BLOCKS = {"blocks.num": N, "blocks.overlap": 0.0}


def make(**flags):
    config = load_config(None, SMALL | flags)
    objective = build_objective(config, build(config, V)).double()
    with torch.no_grad():  # a modulation that starts at zero would hide the level; a head that is unsure, everything
        for name, parameter in objective.named_parameters():
            if "modulation" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.2)
        objective.model.embed.weight.mul_(8)
    return objective


def sentence(rows=1, length=L):
    """One sequence, so many times over, and the token before it that nobody predicts."""
    drawn = torch.randint(V, (1, length + 1), generator=torch.Generator().manual_seed(1))
    return drawn.expand(rows, -1).contiguous()


@torch.no_grad()
def exact_bound(objective):
    """The integral over levels of (1/m) E[sum over the hidden] / L, by enumerating what is hidden, block by block at
    the nodes of a quadrature."""
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(12))
    masks, total = torch.tensor(list(itertools.product((True, False), repeat=L))), 0.0
    for high, low in itertools.pairwise(objective.edges.tolist()):
        for node, share in zip(nodes.tolist(), weights.tolist(), strict=True):
            m = low + (high - low) * (node + 1) / 2
            tokens = sentence(len(masks))[:, 1:]
            logits = objective.logits(tokens.masked_fill(masks, V), torch.full((len(masks),), m, dtype=torch.float64))
            losses = -logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            chance = torch.where(masks, m, 1 - m).double().prod(1)
            total += share * (high - low) / 2 * (chance * (losses * masks).sum(1)).sum().item() / m / L
    return total


# ---- the loss


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_loss_of_a_step_by_hand(schedule):
    objective, rows = make(**{"masked.schedule": schedule}), 4
    random, tokens = StepRandom(0, 3, count=rows), sentence(rows)
    t = random.stratified("time")
    m = level(schedule, t)
    shown, hidden = hide(tokens[:, 1:], m, random.uniform("hidden", (L,)), V)
    losses = token_losses(objective.logits(shown, m), tokens[:, 1:])
    by_hand = (weight(schedule, t) * (losses * hidden).sum(1) / L).mean()
    assert hidden.any()
    assert objective(tokens, random).value.item() == pytest.approx(by_hand.item(), rel=1e-5)  # token_losses: float32


def mean_of_steps(objective, training, num=10, rows=64):
    """(mean, its error) of the loss; in training of several blocks that of all, each as often as it is drawn."""
    def loss(step):
        random = StepRandom(0, step, count=rows)
        if training and isinstance(objective, MaskedBlocks):
            losses = [objective.loss_of(block, objective.ask(sentence(rows)), random).value for block in range(N)]
            return (objective.shares * torch.stack(losses)).sum().item()
        return objective(sentence(rows), random).value.item()

    objective.train(training)
    values = torch.tensor([loss(step) for step in range(num)])
    return values.mean().item(), values.std().item() / num**0.5


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("flags", [{}, {"masked.schedule": "cosine"}, BLOCKS,
                                   BLOCKS | {"masked.schedule": "cosine", "blocks.choose": "mass"}], ids=str)
@torch.no_grad()
def test_the_mean_loss_is_the_bound_by_enumeration(flags, training, unchecked):
    """Of several blocks too, each in as many steps as it is drawn."""
    objective = make(**flags)
    expected = exact_bound(objective)
    mean, error = mean_of_steps(objective, training)
    assert abs(mean - expected) < 4 * error
    assert error < 0.08 * expected


@torch.no_grad()
def test_a_loss_without_its_weights_is_another(monkeypatch, unchecked):
    """The positive control."""
    objective = make()
    monkeypatch.setattr("looped.diffusion.masking.weight", lambda name, t: torch.ones_like(t))
    mean, error = mean_of_steps(objective, training=True)
    assert abs(mean - exact_bound(objective)) > 10 * error


@torch.no_grad()
def test_the_loss_in_evaluation_varies_less(unchecked):
    objective = make()
    assert mean_of_steps(objective, training=False)[1] < 0.7 * mean_of_steps(objective, training=True)[1]


def test_a_batch_of_parts_makes_the_loss_of_the_whole():
    objective, tokens = make(), torch.randint(V, (4, L + 1), generator=torch.Generator().manual_seed(0))
    whole = objective(tokens, StepRandom(0, 0, count=4)).value
    parts = [objective(tokens[i : i + 2], StepRandom(0, 0, start=i, count=2, total=4)).value for i in (0, 2)]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-12)


# ---- the network


@torch.no_grad()
def test_what_is_hidden_cannot_be_seen_and_what_is_seen_is_from_both_sides():
    objective, m = make(), torch.tensor([0.5], dtype=torch.float64)
    logits = objective.logits(torch.tensor([[1, V, 2]]), m)
    for place in (0, 2):
        other = torch.tensor([[1, V, 2]])
        other[0, place] = 4
        assert not torch.allclose(objective.logits(other, m)[0, 1], logits[0, 1])
    assert logits.shape[-1] == V  # the mask token is never predicted
    assert len(objective.model.embed.weight) == V + 1
    other, hide_all = sentence(2), torch.ones(2, dtype=torch.float64)
    other[1, 1:] = (other[1, 1:] + 1) % V
    shown, _ = hide(other[:, 1:], hide_all, torch.zeros(2, L), V)
    a, b = objective.logits(shown, hide_all)
    torch.testing.assert_close(a, b)


@torch.no_grad()
def test_the_level_is_told_unless_it_is_not_to_be():
    tokens, (low, high) = torch.tensor([[1, V, 2]]), torch.tensor([[0.2], [0.9]], dtype=torch.float64)
    told, untold = make(), make(**{"masked.cond_width": None})
    assert not torch.allclose(told.logits(tokens, low), told.logits(tokens, high))
    assert torch.equal(untold.logits(tokens, low), untold.logits(tokens, high))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert told.logits(tokens.expand(2, -1), ends).isfinite().all()


@pytest.mark.parametrize("flags", [{}, {"masked.cond_width": None, "model.injection": "none"}], ids=str)
def test_every_weight_gets_a_gradient(flags):
    objective = make(**flags)
    objective(sentence(4), StepRandom(0, 0, count=4)).value.backward()
    assert all(p.grad is not None for p in objective.parameters())
    assert objective.model.embed.weight.grad[V].abs().sum() > 0


# ---- several blocks


@pytest.mark.parametrize("shared", ["trained", "frozen"])
def test_the_active_block_alone_gets_a_gradient(shared):
    objective, drawn = make(**BLOCKS, **{"blocks.shared": shared}), set()
    for step in range(12):
        random = StepRandom(0, step, count=4)
        objective(sentence(4), random).value.backward()
        drawn.add(objective.sample_block(random))
        for number, block in enumerate(objective.model.recurrence.core.blocks):
            assert all((p.grad is not None) == (number == objective.sample_block(random)) for p in block.parameters())
        assert all((p.grad is not None) == (shared == "trained") for p in objective.shared_parameters())
        objective.zero_grad()
    assert drawn == {0, 1, 2}


def test_a_block_is_trained_on_its_own_levels_and_a_little_beyond(monkeypatch):
    objective, seen = make(**BLOCKS | {"blocks.overlap": 0.1}), []
    read = objective.read
    monkeypatch.setattr(objective, "read", lambda tokens, m, rows: (seen.append(m), read(tokens, m, rows))[1])
    for block, (low, high) in enumerate([(2 / 3 - 1 / 30, 1), (1 / 3 - 1 / 30, 2 / 3 + 1 / 30), (0, 1 / 3 + 1 / 30)]):
        objective.loss_of(block, objective.ask(sentence(200)), StepRandom(0, 0, count=200))
        assert (seen[-1].min().item(), seen[-1].max().item()) == pytest.approx((low, high), abs=0.01)


@torch.no_grad()
def test_each_sequence_is_read_by_the_block_that_owns_its_level():
    objective, m = make(**BLOCKS), torch.tensor([0.1, 0.9, 0.5, 0.95], dtype=torch.float64)
    tokens = torch.tensor([[1, V, 2], [V, V, 0], [3, V, V], [V, V, V]])
    together = objective.read_by_owners(tokens, m)
    for row, block in enumerate((2, 0, 1, 0)):
        one = slice(row, row + 1)
        alone = [objective.read(tokens[one], m[one], TOGETHER.having(block=other))[0] for other in range(N)]
        torch.testing.assert_close(together[row], alone[block])
        assert not any(torch.allclose(together[row], alone[other]) for other in range(N) if other != block)


def test_a_step_of_one_block_costs_that_block_and_the_twin_costs_all():
    several, twin = make(**BLOCKS), make(**{"blocks.num": 1})
    assert (several.layer_forwards(), twin.layer_forwards()) == (3 * (1 + 1 + 1), 3 * (1 + 3 + 1))
    frozen = make(**BLOCKS, **{"blocks.shared": "frozen"})
    assert frozen.layer_forwards() == 3 * 3 - 2 - 1


# ---- settings


@pytest.mark.parametrize(("flags", "said"), [
    ({"task.name": "parity"}, "objective masked masks tokens of text, and task.name parity is not text"),
    ({"images.source": "digits"}, "objective masked masks tokens of text, and images.source digits is not text"),
    ({"blocks.num": 3, "blocks.edges": [5.0, 1.0]}, "blocks.edges splits levels of sigma"),
    ({"blocks.num": 3, "blocks.partition": "log-uniform"}, "blocks.partition log-uniform splits levels of sigma"),
    ({"masked.schedule": "cosin"}, "masked.schedule: input should be 'linear' or 'cosine'"),
    ({"blocks.num": 2}, "model.num_core_layers 3 does not split into blocks.num 2")])
def test_what_does_not_fit_is_refused_in_one_sentence(flags, said):
    with pytest.raises(UserError, match=said):
        load_config(None, SMALL | flags)
