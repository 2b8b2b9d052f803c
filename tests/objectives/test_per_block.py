"""Blocks that share nothing but the targets: the same first weights as frozen ones, and each learns all it has."""

import pytest
import torch

from looped.config import load_config
from looped.data.batch import Batch
from looped.errors import UserError
from looped.evaluation.generation import generate
from looped.evaluation.inference_cost import likelihood_cost
from looped.evaluation.likelihood import losses_by_depth
from looped.models.build import build
from looped.objectives import build_objective
from looped.objectives.counts import count
from looped.rng import StepRandom

V, L, N = 30, 8, 3
SMALL = {"objective": "blockwise", "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 4,
         "blocks.num": N, "blocks.layers": [1, 2, 1], "denoise.target.dim": 4, "denoise.cond_width": 8,
         "data.length": L, "evaluation.prompt_length": 4, "blocks.shared": "per-block"}
CONTEXTS = ["inject", "concat", "context"]


def make(**flags):
    config = load_config(None, SMALL | flags)
    return build_objective(config, build(config, V))


def tokens(rows=4):
    return torch.randint(V, (rows, L + 1), generator=torch.Generator().manual_seed(0))


def own(objective, block):
    named = dict(objective.named_parameters())
    return {name: named[name] for name in objective.names_of(block)}


@pytest.mark.parametrize("context", CONTEXTS)
@torch.no_grad()
def test_it_starts_as_frozen_blocks_do_and_reads_as_they_do(context):
    ours, frozen = (make(**{"denoise.context": context, "blocks.shared": shared}).eval()
                    for shared in ("per-block", "frozen"))
    for block in range(N):
        a, b = (each.loss_of(block, Batch.of(tokens()), StepRandom(0, 0, count=4)).value for each in (ours, frozen))
        assert torch.equal(a, b)
    for a, b in zip(losses_by_depth(ours, tokens(), [1, 3]), losses_by_depth(frozen, tokens(), [1, 3]), strict=True):
        torch.testing.assert_close(a.losses, b.losses)
    prompts = tokens()[:, :4]
    assert torch.equal(generate(ours, prompts, num_tokens=3, depth=3), generate(frozen, prompts, num_tokens=3, depth=3))


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_block_learns_all_that_it_has_and_nothing_of_another(context):
    objective = make(**{"denoise.context": context})
    for block in range(N):
        objective.loss_of(block, Batch.of(tokens()), StepRandom(0, 0, count=4)).value.backward()
        for other in range(N):
            assert {p.grad is not None for p in own(objective, other).values()} == {other == block}
        objective.zero_grad()
    assert not any(p.requires_grad for p in objective.shared_parameters())
    assert [name for name, p in objective.named_parameters() if not p.requires_grad] == ["denoiser.targets.weight"]


@torch.no_grad()
def test_what_another_block_has_does_not_move_a_blocks_loss_and_its_own_does():
    objective, random = make(), StepRandom(0, 0, count=4)
    before = objective.loss_of(1, Batch.of(tokens()), random).value
    for block, same in ((0, True), (2, True), (1, False)):
        for parameter in own(objective, block).values():
            parameter.add_(0.5)
        assert torch.equal(objective.loss_of(1, Batch.of(tokens()), random).value, before) == same


@torch.no_grad()
def test_a_level_is_read_by_its_owner_with_the_owners_prelude_and_head():
    objective = make(**{"denoise.context": "inject"}).eval()
    x, z = tokens(3)[:, :-1], torch.zeros(3, L, 4)
    sigma = torch.tensor([20.0, 3.0, 0.6], dtype=torch.float64)
    for row, block in enumerate(objective.denoiser.owners(sigma).tolist()):
        before = objective.logits(x, z, sigma)
        for name, parameter in own(objective, block).items():
            if "embed" in name:
                parameter.mul_(-1.0)
        moved = (objective.logits(x, z, sigma) - before).abs().amax((1, 2)) > 1e-6
        assert moved.tolist() == [each == row for each in range(3)]


def test_one_alone_has_the_first_weights_of_the_whole_and_none_of_the_others():
    whole = make()
    for block in range(N):
        alone = make(**{"blocks.alone": block})
        theirs, mine = dict(whole.named_parameters()), dict(alone.named_parameters())
        assert mine.keys() == whole.names_of(block) | {"denoiser.targets.weight"}
        assert all(torch.equal(weight, theirs[name]) for name, weight in mine.items())
        with pytest.raises(UserError, match="looped merge"):
            alone.logits(tokens()[:, :-1], torch.zeros(4, L, 4), torch.full((4,), 3.0, dtype=torch.float64))


def test_reading_costs_a_prelude_a_block():
    assert [likelihood_cost(make(), depth).layer_forwards for depth in (1, 3)] == [N + 1 + 1, N + 4 + 3]


@pytest.mark.parametrize("alone", [None, 1])
def test_parameters_are_counted(alone):
    flags = {"blocks.alone": alone}
    counted = count(load_config(None, SMALL | flags), V).parameters
    assert counted == sum(p.numel() for p in make(**flags).parameters())


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"set denoise.target.tied to false"):
        make(**{"denoise.target.tied": True, "denoise.target.dim": 16})
    with pytest.raises(UserError, match=r"blocks.shared per-block is for objective blockwise"):
        make(**{"objective": "ar"})
