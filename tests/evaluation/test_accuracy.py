"""Accuracy over depth: read as by hand, the same in any batches, learned by loops and denoisers alike."""

import pytest
import torch

from looped.config import load_config
from looped.config.images import ImageConfig
from looped.data.image_batches import prepare_labelled
from looped.evaluation.accuracy import classify
from looped.models.language import Structure
from looped.models.vision import ImageClassifier
from looped.objectives import build_objective
from looped.objectives.base import rows_of_batch
from looped.rng import StepRandom, seeded_init
from looped.training.optim import build_optimizers

TINY = {"model.width": 32, "model.num_heads": 2, "model.ffn_width": 48, "model.num_core_layers": 1,
        "model.num_prelude_layers": 0, "model.num_coda_layers": 0, "model.state_init": "zero", "recurrence.mean": 2,
        "denoise.cond_width": 16, "denoise.context": "inject", "denoise.bridge": "soft", "denoise.start": "zero"}


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return prepare_labelled(ImageConfig(source="digits"), 4)


def made(digits, objective, **settings):
    config = load_config(None, TINY | {"objective": objective} | settings)
    cond_width = config.denoise.cond_width if objective == "denoise" else None
    with seeded_init(0, "init"):
        model = ImageClassifier(config.model, digits.vocab_size, digits.picture, Structure(cond_width=cond_width))
    return build_objective(config, model), config


def test_a_loop_names_the_class_that_its_first_row_reads(digits):
    rule, config = made(digits, "full")
    found = classify(rule, digits, config, [1, 3])
    assert sorted(found.right) == [1, 3]
    (batch,) = digits.heldout(1000)
    rows = rows_of_batch(batch)
    with torch.no_grad():
        state = rule.model.unroll(rule.model.encode(batch.inputs, rows), rows, grad=3)
        named = rule.model.decode(state, rows)[:, 0].argmax(-1)
    assert torch.equal(found.right[3], named == batch.targets[:, 0])
    (row,) = [row for row in found.rows if row.depth == 3]
    assert (row.metric, row.n) == ("accuracy", len(batch))
    assert row.mean == pytest.approx(found.right[3].double().mean().item())


def test_an_image_is_named_the_same_in_any_batch(digits):
    rule, config = made(digits, "denoise", **{"denoise.start": "noise", "evaluation.batch_size": 64})
    with torch.no_grad():
        rule.model.embed.weight.mul_(30)  # so that different draws give different classes
    _, other = made(digits, "denoise", **{"denoise.start": "noise", "evaluation.batch_size": 7})
    wide, narrow = (classify(rule, digits, each, [4]).right[4] for each in (config, other))
    assert torch.equal(wide, narrow)


@pytest.mark.parametrize("objective", ["full", "denoise"])
def test_a_hundred_steps_name_most_digits(digits, objective):
    """Chance is 0.1."""
    rule, config = made(digits, objective)
    optimizers = build_optimizers(rule.train(), config.optim)
    before = classify(rule, digits, config, [2]).best()[1]
    for step in range(100):
        batch = digits.train.batch(step, batch_size=64, seed=0)
        rule(batch, StepRandom(0, step, count=64, total=64)).value.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert before < 0.3
    assert classify(rule, digits, config, [2]).best()[1] > 0.5
