"""Temperature, top-k and top-p keep what they should; a denoiser draws from the steered distribution at any depth."""

import pytest
import torch

from looped.config import load_config
from looped.diffusion.sampling_params import SamplingParams
from looped.errors import UserError
from looped.inference.generate import generate
from looped.models.build import build
from looped.objectives import build_objective

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

PROBS = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=torch.float64)


@pytest.mark.parametrize(("steering", "expected"), [
    (SamplingParams(), [0.1, 0.4, 0.05, 0.25, 0.2]),
    (SamplingParams(top_k=2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
    (SamplingParams(top_p=0.6), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
    (SamplingParams(top_p=0.3), [0, 1, 0, 0, 0]),
    (SamplingParams(top_k=3, top_p=0.7), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
    (SamplingParams(temperature=0), [0, 1, 0, 0, 0]),
    (SamplingParams(temperature=0.5), [p**2 / (PROBS**2).sum().item() for p in PROBS.tolist()]),
    (SamplingParams(top_k=99, top_p=1.0), [0.1, 0.4, 0.05, 0.25, 0.2]),
])
def test_the_steered_distribution_is_the_definition(steering, expected):
    torch.testing.assert_close(steering(PROBS.log()).softmax(-1), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0},
                                      {"top_p": 0.0}, {"top_p": 1.5}])
def test_steering_out_of_range_is_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        SamplingParams(**settings)


@pytest.fixture(scope="module")
def exact():
    """A denoiser whose network answers p(token | context) whatever z is; the known part makes it exact."""
    config = load_config(None, {"model.width": 16, "model.num_heads": 2, "denoise.target.dim": 4,
                                "denoise.solver": "ancestral", "denoise.bridge": "sampled"})
    objective = build_objective(config, build(config, 8)).eval()
    torch.nn.init.zeros_(objective.denoiser.in_proj.weight)
    objective.model.embed.weight.data.mul_(2)
    return objective


def drawn(objective, depth, **steering):
    """Shares of the eight tokens after one prompt, over 4,000 draws."""
    prompt = torch.tensor([[1, 5, 2]]).expand(4000, -1)
    tokens = generate(objective, prompt, num_tokens=1, depth=depth, **steering)
    return torch.bincount(tokens.flatten(), minlength=8).double() / 4000


def known(objective, steering):
    """What the steered network says, without any z."""
    z = torch.zeros(1, 3, 4)
    with torch.no_grad():
        logits = objective.logits(torch.tensor([[1, 5, 2]]), z, torch.tensor([20.0], dtype=torch.float64))
    return steering(logits[0, -1]).softmax(-1).double()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("depth", [1, 6])
@pytest.mark.parametrize("steering", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 0.0}],
                         ids=str)
def test_a_denoiser_draws_from_the_steered_distribution_at_any_depth(exact, depth, steering):
    expected = known(exact, SamplingParams(**steering))
    shares = drawn(exact, depth, **steering)
    error = 4 * (expected * (1 - expected) / 4000).sqrt() + 1e-9  # four standard errors
    assert ((shares - expected).abs() <= error + 0.01).all()  # z at sigma_max says a little about y: 0.01
    assert ((expected > 0) | (shares == 0)).all()


@pytest.mark.usefixtures("unchecked")
def test_steering_changes_what_is_drawn(exact):
    """The positive control of the tests above: the steered distributions differ by far more than their tolerance."""
    plain, cool = known(exact, SamplingParams()), known(exact, SamplingParams(temperature=0.5))
    assert (plain - cool).abs().max() > 0.1
