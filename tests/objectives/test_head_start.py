"""A fixed point whose solver starts from a first pass: the loss of both, what it costs, and depth 1 as its proposal."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from looped.config import load_config
from looped.config.unread_settings import not_read_under
from looped.evaluation.depth_sweep import evaluate_depth
from looped.models.build import build
from looped.objectives import build_objective
from looped.rng import StepRandom

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

VOCAB = 30
SMALL = {"objective": "fixed-point", "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1,
         "model.injection": "diagonal", "fixed_point.max_steps": 200, "fixed_point.tol": 1e-9}
HEAD_START = {"fixed_point.head_start": "pass", "fixed_point.head_start_weight": 0.7}


def make(**flags):
    config = load_config(None, SMALL | flags)
    rule = build_objective(config, build(config, VOCAB)).double()
    with torch.no_grad():  # a contraction, so that the fixed point does not depend on the start
        for layer in rule.model.recurrence.core.blocks[0].layers:
            layer.attn.out.weight.mul_(0.1)
            layer.mlp.out.weight.mul_(0.1)
    return rule


def text():
    return torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))


def draw():
    return StepRandom(0, 0, count=3)


def proposed(rule):
    e = rule.model.encode(text()[:, :-1])
    return rule.model.step(rule.model.initial_state(e, draw().normal("state", e.shape[1:])), e)


def read(rule, state):
    return cross_entropy(rule.model.decode(state).flatten(0, 1), text()[:, 1:].flatten())


def test_the_loss_is_that_of_the_fixed_point_and_of_the_proposal():
    """And so is the gradient: the solver's start carries none."""
    plain, rule = make(), make(**HEAD_START)
    alone, both = plain(text(), draw()), rule(text(), draw())
    own = read(rule, proposed(rule))
    assert both.value.item() == pytest.approx(alone.value.item() + 0.7 * own.item(), rel=1e-6)
    assert both.metrics["head_start_loss"].item() == pytest.approx(own.item(), rel=1e-6)
    grads = [torch.autograd.grad(loss, [p for p in one.parameters() if p.requires_grad])
             for loss, one in ((alone.value, plain), (0.7 * own, rule), (both.value, rule))]
    for first, second, sum_of_both in zip(*grads, strict=True):
        torch.testing.assert_close(sum_of_both, first + second, rtol=1e-4, atol=1e-7)


def test_the_solver_starts_from_the_proposal_and_saves_its_step(monkeypatch):
    rule = make(**HEAD_START, **{"fixed_point.solver": "fixed_point_iter", "fixed_point.tol": 1e-6})
    plain = make(**{"fixed_point.solver": "fixed_point_iter", "fixed_point.tol": 1e-6})
    starts, solve = [], rule.equilibrium._solve
    monkeypatch.setattr(rule.equilibrium, "_solve", lambda f, state: starts.append(state) or solve(f, state))
    found = rule(text(), draw()).metrics
    torch.testing.assert_close(starts[0], proposed(rule).detach())
    assert found["num_steps"] == plain(text(), draw()).metrics["num_steps"] - 1
    assert 0 < found["head_start_distance"] < 1


def test_a_proposal_at_the_fixed_point_has_no_distance_from_it():
    """A core that forgets its state is at its fixed point after one pass."""
    rule = make(**HEAD_START)
    rule.model.step = lambda state, e, level=None, rows=None: e + 0 * state
    metrics = rule(text(), draw()).metrics
    assert metrics["head_start_distance"] < 1e-6
    assert metrics["head_start_loss"].item() == pytest.approx(read(rule, rule.model.encode(text()[:, :-1])).item())


@pytest.mark.parametrize("gradient", ["phantom", "implicit"])
def test_it_costs_one_pass_and_one_readout_with_gradient(gradient):
    flags = {"fixed_point.gradient": gradient, "fixed_point.max_steps": 5, "fixed_point.tol": 0.0}
    plain, rule = make(**flags), make(**flags, **HEAD_START)
    for _ in range(2):  # before a step and after it
        assert rule.layer_forwards() == plain.layer_forwards() + 3 * (1 + 1)
        for each in (plain, rule):
            each(text(), draw()).value.backward()
            each.after_step()
    assert rule.expected_depths() == (5, 2)


def test_depth_1_of_an_evaluation_is_the_proposal():
    rule = make(**HEAD_START, **{"model.state_init": "zero"})
    e = rule.model.encode(text()[:, :-1])
    expected = read(rule, rule.model.step(torch.zeros_like(e), e)).item()
    found = evaluate_depth(rule, text(), depths=[1], bytes_per_token=1.0).means("nats_per_token")[1]
    assert found == pytest.approx(expected, rel=1e-6)


def test_its_weight_is_read_with_it_alone():
    config = load_config(None, SMALL | HEAD_START)
    assert not not_read_under(config, "fixed_point.head_start_weight")
    off = config.replace(**{"fixed_point.head_start": "none"})
    assert not_read_under(off, "fixed_point.head_start_weight") == "fixed_point.head_start none"
