"""Parts of the gradient through the loop: each rule drops one, and together they are the whole."""

import sys
from pathlib import Path

import pytest
import torch

from looped.config import load_config
from looped.models.build import build
from looped.objectives.bptt import Full
from looped.objectives.gradient_parts import LastInput, LastWeights, RandomWeights
from looped.rng import StepRandom
from looped.training.train import train

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import gradient_parts
from gradient_parts import by_step, flat, gradient, groups

pytestmark = pytest.mark.usefixtures("unchecked")

DEPTH = 3


@pytest.fixture(scope="module", params=["none", "update"])
def model(request):
    config = load_config(None, {"objective": "full", "model.width": 16, "model.num_heads": 2, "recurrence.mean": DEPTH,
                                "model.num_prelude_layers": 0, "model.num_core_layers": 1, "model.num_coda_layers": 0,
                                "model.loop_scale": request.param})
    return build(config, 40).double(), config.recurrence


def gradients(model, rule, depth=DEPTH, **attributes):
    objective = rule(*model).double()
    vars(objective).update(attributes)
    start = objective.start(torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0)),
                            StepRandom(0, 0, count=2))
    return objective, start, gradient(objective, objective.loss_after(start, 0, depth))


@pytest.mark.parametrize("depth", [DEPTH, 2], ids=["at the mean", "in an earlier stage"])
def test_one_random_step_is_the_whole_gradient_on_average(model, depth):
    *_, whole = gradients(model, Full, depth)
    each = [gradients(model, RandomWeights, depth, uniform=(step + 0.5) / depth)[2] for step in range(depth)]
    for name, value in whole.items():
        torch.testing.assert_close(torch.stack([part[name] for part in each]).mean(0), value)
    core = groups(gradients(model, Full)[0])["core"]
    assert not torch.allclose(flat(each[0], core), flat(whole, core))


def test_the_last_step_alone_teaches_the_core_and_the_input_learns_from_all(model):
    objective, start, whole = gradients(model, Full)
    *_, part = gradients(model, LastWeights)
    core, embedding = groups(objective)["core"], groups(objective)["embedding"]
    steps = by_step(objective, start, DEPTH)
    torch.testing.assert_close(flat(part, core), steps[-1])
    torch.testing.assert_close(sum(steps), flat(whole, core))
    torch.testing.assert_close(flat(part, embedding), flat(whole, embedding))


def test_the_input_learns_from_the_last_step_alone_and_the_core_from_all(model):
    objective, _, whole = gradients(model, Full)
    *_, part = gradients(model, LastInput)
    core, embedding = groups(objective)["core"], groups(objective)["embedding"]
    torch.testing.assert_close(flat(part, core), flat(whole, core))
    assert not torch.allclose(flat(part, embedding), flat(whole, embedding))


def test_the_rules_train_and_their_cosines_are_printed(tmp_path, monkeypatch, capsys):
    config = load_config("smoke", {"objective": "looped.objectives.gradient_parts.RandomWeights", "recurrence.mean": 2,
                                   "recurrence.distribution": "fixed", "training.budget": 2,
                                   "training.budget_unit": "steps"})
    train(config, tmp_path / "run", quiet=True)
    monkeypatch.setattr(sys, "argv", ["gradient_parts.py", str(tmp_path / "run"), "--depth", "2", "--batches", "1"])
    gradient_parts.main()
    said = capsys.readouterr().out
    assert "last 2: cosine, all                            1.000" in said
    assert "weights of step 1 alone: cosine, core" in said
