"""Guidance by a model that has also learned to answer without the image: what is left out, and what is added up."""

import pytest
import torch

from looped.config import load_config
from looped.config.training import EvaluationConfig
from looped.cost.counts import count
from looped.data.image_batches import ImageSpec
from looped.data.images import ImageBatch
from looped.errors import UserError
from looped.inference.denoiser_rollout import Solver
from looped.inference.rollout import rollout_of
from looped.models.build import build
from looped.objectives import build_objective
from looped.objectives.base import rows_of_batch
from looped.rng import StepRandom

CLASSES, ROWS = 6, 4
PICTURE = ImageSpec(1, 4, 4, 2)
SMALL = {"images.source": "digits", "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 2,
         "model.num_coda_layers": 0, "model.patch_size": 2, "denoise.cond_width": 8, "denoise.context": "inject",
         "denoise.context_dropout": 0.25}
RULES = {"denoise": {}, "blockwise": {"blocks.num": 2}}


def make(rule="denoise", **flags):
    config = load_config(None, SMALL | RULES[rule] | {"objective": rule} | flags)
    objective = build_objective(config, build(config, CLASSES, PICTURE))
    with torch.no_grad():  # as if trained: a row of zeros would be a special case
        for parameter in (objective.denoiser.nothing, objective.model.class_row):
            if parameter is not None:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return objective


def images(seed=0):
    gen = torch.Generator().manual_seed(seed)
    return PICTURE.ask(ImageBatch(torch.randn(ROWS, 1, 4, 4, generator=gen), torch.arange(ROWS)))


def solve(objective, depth=3):
    with torch.no_grad():
        return Solver(objective.eval(), images()).run(depth, StepRandom(0, 0, count=ROWS)).logits


def one_reading(objective, batch):
    """(z, sigma, e, rows) of a reading."""
    rows, gen = rows_of_batch(batch), torch.Generator().manual_seed(3)
    z = torch.zeros(ROWS, 5, objective.denoiser.targets.dim)
    z[:, 0] = torch.randn(ROWS, z.shape[-1], generator=gen)
    return z, torch.full((ROWS,), 2.0, dtype=torch.float64), objective.model.encode(batch.inputs, rows), rows


@pytest.mark.parametrize("rule", RULES)
def test_without_guidance_answers_are_the_same_bits_of_as_many_readings(rule, monkeypatch):
    objective, reads = make(rule), []
    read = objective.denoiser.read
    monkeypatch.setattr(objective.denoiser, "read", lambda *args, **kw: (reads.append(args[3].block),
                                                                        read(*args, **kw))[1])
    plain = solve(objective)
    once = [block for block in reads if block is not None or rule == "denoise"]
    assert len(once) == 3
    monkeypatch.setattr(objective.denoiser, "guided", lambda logits, *args, **kw: logits)
    assert torch.equal(solve(objective), plain)


@pytest.mark.parametrize("rule", RULES)
def test_guidance_moves_away_from_what_is_said_without_the_image(rule):
    objective = make(rule, **{"denoise.guidance": 2.5}).eval()
    z, sigma, e, rows = one_reading(objective, images())
    with torch.no_grad():
        shown, _ = objective.denoiser.read(z, sigma, e, rows)
        blind, _ = objective.denoiser.read(z, sigma, objective.denoiser.nothing.expand_as(e), rows)
        guided = objective.denoiser.guided(shown, z, sigma, e, rows)
    torch.testing.assert_close(guided, 2.5 * shown - 1.5 * blind)
    assert (shown - blind).abs().max() > 1e-3
    assert not torch.equal(solve(objective), solve(make(rule)))


def test_an_image_that_is_left_out_says_nothing():
    objective = make().eval()
    logits = []
    for seed in (0, 1):
        z, sigma, e, rows = one_reading(objective, images(seed))
        logits.append([objective.denoiser(z, sigma, given, rows) for given in (objective.denoiser.without(e), e)])
    assert torch.equal(logits[0][0], logits[1][0])
    assert not torch.equal(logits[0][1], logits[1][1])  # positive control


def test_training_leaves_out_its_share_of_the_images_and_evaluation_none(monkeypatch):
    objective, dropped = make(), []
    without = objective.denoiser.without
    monkeypatch.setattr(objective.denoiser, "without", lambda e, some: (dropped.append(some), without(e, some))[1])
    for step in range(100):
        objective.train()(images(), StepRandom(0, step, count=ROWS))
    assert torch.cat(dropped).double().mean().item() == pytest.approx(0.25, abs=0.06)
    objective.eval()(images(), StepRandom(0, 0, count=ROWS))
    assert len(dropped) == 100


def test_only_images_that_are_left_out_teach_the_row_in_their_place():
    objective = make()
    e = torch.ones(2, 5, 16, requires_grad=True)
    objective.denoiser.without(e, torch.tensor([True, False])).sum().backward()
    assert e.grad.sum((1, 2)).tolist() == [0, 5 * 16]
    assert objective.denoiser.nothing.grad.tolist() == [5.0] * 16


def test_guidance_costs_each_reading_twice_and_the_row_one_width():
    assert rollout_of(make()).answer_cost(3, EvaluationConfig()).layer_forwards == 1 + 3 * 2
    assert rollout_of(make(**{"denoise.guidance": 2.0})).answer_cost(3, EvaluationConfig()).layer_forwards == 1 + 6 * 2
    pytest.importorskip("sklearn")
    sizes = [count(load_config(None, SMALL | {"denoise.context_dropout": share}), CLASSES).parameters
             for share in (0, 0.25)]
    assert sizes[1] - sizes[0] == 16


@pytest.mark.parametrize(("flags", "why"), [
    ({"denoise.context_dropout": 0, "denoise.guidance": 2}, "set denoise.context_dropout to 0.1, or denoise.guidance"),
    ({"images.source": None}, "hides images in training, and this config has none; set images.source"),
    ({"denoise.context_dropout": 1}, "less than 1"), ({"denoise.guidance": -1}, "denoise.guidance")])
def test_what_does_not_fit_is_named_in_one_sentence(flags, why):
    with pytest.raises(UserError, match=why) as error:
        load_config(None, SMALL | flags)
    assert "\n" not in str(error.value)
