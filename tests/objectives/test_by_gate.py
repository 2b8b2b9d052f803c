"""A loss that is expected under the exit gate, by hand; what it trains, and that nothing else trains the gate."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from looped.config import load_config
from looped.errors import UserError
from looped.models.build import build
from looped.objectives import build_objective
from looped.objectives.degenerate_loops import cautions
from looped.rng import StepRandom
from looped.training.optim import build_optimizers

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

VOCAB = 30
SMALL = {"objective": "full", "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "recurrence.mean": 4,
         "model.exit_gate": True}
BY_GATE = {"recurrence.loss_on": "gate"}


def make(**flags):
    config = load_config(None, SMALL | flags)
    rule = build_objective(config, build(config, VOCAB)).double()
    with torch.no_grad():
        for number, parameter in enumerate(rule.model.exit_gate.parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return rule, config


def text():
    return torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))


def draw(step=0):
    return StepRandom(0, step, count=3)


def by_hand(rule, beta):
    """sum_i p_i loss_i - beta H(p) of every token; p_i = lambda_i times (1 - lambda_j) of all j < i, the last the rest.
    """
    model = rule.model
    e = model.encode(text()[:, :-1])
    state = model.initial_state(e, draw().normal("state", e.shape[1:]))
    stays, value = torch.ones(3, 8, dtype=torch.float64), torch.zeros(3, 8, dtype=torch.float64)
    for i in range(4):
        state = model.step(state, e)
        loss = cross_entropy(model.decode(state).flatten(0, 1), text()[:, 1:].flatten(), reduction="none").view(3, 8)
        leaves = torch.sigmoid(state @ model.exit_gate.weight[0] + model.exit_gate.bias)
        p = stays * leaves if i < 3 else stays
        value, stays = value + p * loss + beta * p * p.log(), stays * (1 - leaves)
    return value.mean()


@pytest.mark.parametrize("beta", [0.0, 0.1, 2.0])
def test_the_loss_is_expected_under_the_gate_less_the_entropy_of_its_choice(beta):
    """And so are the gradients of all that learns."""
    rule, _ = make(**BY_GATE, **{"recurrence.gate_entropy": beta})
    value, expected = rule(text(), draw()).value, by_hand(rule, beta)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    learns = [p for p in rule.parameters() if p.requires_grad]
    for ours, theirs in zip(torch.autograd.grad(value, learns), torch.autograd.grad(expected, learns), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert by_hand(rule, beta + 0.1).item() < expected.item() - 0.05  # beta counts
    assert rule.layer_forwards() == 3 * (1 + 4 + 4)  # a readout after every pass


def test_entropy_keeps_all_passes_in_play():
    """The gate alone learns: with much weight on entropy its choice has more of it than with none."""
    ends = {}
    for beta in (0.0, 50.0):
        rule, _ = make(**BY_GATE, **{"recurrence.gate_entropy": beta})
        optimizer, first = torch.optim.Adam(rule.model.exit_gate.parameters(), lr=0.02), entropy_of(rule)
        for step in range(60):
            optimizer.zero_grad()
            rule(text(), draw(step)).value.backward()
            optimizer.step()
        ends[beta] = entropy_of(rule)
    assert ends[0.0] < first < ends[50.0] <= math.log(4)


def entropy_of(rule):
    """Mean entropy of the gate's choice, from losses with and without it."""
    with torch.no_grad():
        return (by_hand(rule, 0.0) - by_hand(rule, 1.0)).item()


@pytest.mark.parametrize("flags", [
    {}, {"recurrence.loss_on": "every"}, {"objective": "truncated"}, {"objective": "progressive"},
    {"objective": "one-step"}, {"objective": "fixed-point"}], ids=str)
def test_a_gate_that_is_not_asked_stays_as_it_is_and_that_is_said(flags):
    rule, config = make(**flags)
    before = [parameter.clone() for parameter in rule.model.exit_gate.parameters()]
    optimizers = build_optimizers(rule, config.optim)
    rule(text(), draw()).value.backward()
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, rule.model.exit_gate.parameters(), strict=True))
    said = [each for each in cautions(config) if "model.exit_gate is not trained by objective" in each]
    assert len(said) == 1
    assert "\n" not in said[0]
    assert not [each for each in cautions(load_config(None, SMALL | BY_GATE)) if "exit_gate" in each]
    assert not [each for each in cautions(config.replace(**{"model.exit_gate": False})) if "exit_gate" in each]


def test_a_gate_that_is_asked_learns():
    rule, config = make(**BY_GATE)
    before = [parameter.clone() for parameter in rule.model.exit_gate.parameters()]
    rule(text(), draw()).value.backward()
    for optimizer in build_optimizers(rule, config.optim):
        optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(before, rule.model.exit_gate.parameters(), strict=True))


def test_the_twin_without_a_loop_reads_its_one_pass():
    rule, _ = make(objective="ar", **BY_GATE)
    plain, _ = make(objective="ar")
    assert torch.equal(rule(text(), draw()).value, plain(text(), draw()).value)


@pytest.mark.parametrize(("flags", "why"), [
    ({"model.exit_gate": False}, "but model.exit_gate is false; set it to true, or recurrence.loss_on to every"),
    ({"recurrence.mean": 1}, "recurrence.mean 1 has only one; set it to 2"),
    ({"objective": "truncated"}, "truncated has no gradient in some; set objective to full"),
    ({"objective": "progressive"}, "progressive has no gradient in some; set objective to full"),
    ({"objective": "one-step"}, "gate does not fit one-step, whose loss is taken after each segment; set it to last")])
def test_a_gate_that_cannot_be_asked_is_one_sentence(flags, why):
    with pytest.raises(UserError, match=why) as error:
        load_config(None, SMALL | BY_GATE | flags)
    assert "\n" not in str(error.value)
