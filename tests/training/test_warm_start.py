"""A run that starts from another one's weights: all that both have is taken, and what does not fit is named."""

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
    ({"data.vocab_size": 300}, "another tokenizer")])
def test_what_does_not_fit_is_named(start, twin, settings, why):
    with pytest.raises(UserError, match=why):
        start("misfit", **{"training.warm_start": str(twin.path)} | settings)
