"""A run that starts from another one's weights: all that both have is taken, and what does not fit is named."""

import re

import pytest
import torch

from looped.errors import UserError
from looped.training.runs import load_run
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

FROZEN = {"training.budget": 2, "optim.lr": 1e-30, "optim.weight_decay": 0, "denoise.context": "context"}


@pytest.fixture
def twin(tmp_path, tiny):
    train(tiny(**FROZEN, objective="ar", seed=5), tmp_path / "twin")
    return load_run(tmp_path / "twin")


@pytest.fixture
def start(tmp_path, tiny):
    return lambda name, **changes: train(tiny(**FROZEN | changes), tmp_path / name).objective


def test_a_denoiser_starts_as_its_twin(start, twin):
    warm = start("warm", **{"training.warm_start": str(twin.path), "denoise.block_size": 2})
    cold = start("cold", **{"denoise.block_size": 2})
    theirs = twin.objective.model.state_dict()
    shared = [name for name, weight in warm.model.state_dict().items()
              if name in theirs and torch.equal(weight, theirs[name])]
    assert set(shared) == set(theirs)
    assert not torch.equal(cold.model.embed.weight, theirs["embed.weight"])  # positive control
    assert warm.model.recurrence.core.blocks[0].layers[0].modulation.linear.weight.abs().max() < 1e-20


def test_an_interrupted_run_goes_on_from_its_own_weights(start, twin):
    settings = {"training.warm_start": str(twin.path), "optim.lr": 1e-2}
    once = start("run", **settings)
    again = start("run", **settings)  # is finished: nothing is taken over a second time
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters(), strict=True))
    assert not torch.equal(again.model.embed.weight, twin.objective.model.embed.weight)


@pytest.mark.parametrize(("settings", "why"), [
    ({"model.width": 32}, "the same model settings"), ({"model.num_core_layers": 3}, "has no 'model.recurrence"),
    ({"data.vocab_size": 300}, "another tokenizer"),
    ({"model.num_heads": 4}, "was trained with model.num_heads 2, now it is 4, by which its weights would mean"),
    ({"model.num_heads": 1, "model.head_dim": 16}, "with model.num_heads 2, now it is 1"),
    ({"model.num_coda_layers": 0}, "has 'model.coda.*', which this model lacks; give both runs the same model"),
    ({"model.injection": "none"}, "has 'model.*injection.*', which this model lacks")])
def test_what_does_not_fit_is_named(start, twin, settings, why):
    with pytest.raises(UserError, match=why):
        start("misfit", **{"training.warm_start": str(twin.path)} | settings)


def test_what_is_not_used_and_settings_that_differ_are_named(start, twin, tmp_path):
    start("same", **{"training.warm_start": str(twin.path), "objective": "ar"})
    assert line_of(tmp_path / "same") == f"weights of {twin.path}; new: none"
    start("denoiser", **{"training.warm_start": str(twin.path)})
    settings = {"training.warm_start": str(tmp_path / "denoiser"), "objective": "ar", "model.rope_base": 500_000.0}
    start("back", **settings)
    assert re.search("; new: none; not used: .*level_embedding.*; model.rope_base 10000.0 there, 500000.0 here$",
                     line_of(tmp_path / "back"))


def line_of(run):
    """The line in a run's log about the weights that it started from."""
    return next(line for line in (run / "train.log").read_text().splitlines() if line.startswith("weights of"))
