"""Several passes of the core per step: a step is the same passes one by one, under every rule, and costs what they run.
"""

import pytest
import torch
from torch import nn

from looped.config import load_config
from looped.cost.counts import count
from looped.errors import UserError
from looped.models.build import build
from looped.nn.layers import TransformerLayer
from looped.nn.passes import Passes
from looped.objectives import build_objective
from looped.rng import StepRandom

VOCAB, PASSES = 11, 3
SMALL = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 2, "model.state_init": "zero",
         "denoise.target.dim": 8, "denoise.cond_width": 8, "masked.cond_width": 8, "supervision.segments": 2,
         "recurrence.mean": 2, "recurrence.distribution": "fixed", "recurrence.backprop": 1}
BLOCKS = {"blocks.num": 2}
RULES = {
    "full": {"objective": "full"}, "ar": {"objective": "ar"}, "truncated": {"objective": "truncated"},
    "one-step": {"objective": "one-step"}, "two states": {"objective": "full", "model.latent_updates": 2},
    "blocks": {"objective": "full"} | BLOCKS, "masked": {"objective": "masked"},
    **{context: {"objective": "denoise", "denoise.context": context} for context in ("inject", "concat", "context")},
    **{f"blockwise, {context}": {"objective": "blockwise", "denoise.context": context} | BLOCKS
       for context in ("inject", "concat")},
    "a carry over blocks": {"objective": "blockwise", "denoise.context": "concat", "denoise.carry": "latent"} | BLOCKS}


def rule_of(passes=PASSES, **flags):
    config = load_config(None, SMALL | {"model.core_passes": passes} | flags)
    return build_objective(config, build(config, VOCAB)).train()


def text(rows=3, length=7):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def plain_twin(rule, **flags):
    """The same weights with one pass per step."""
    twin = rule_of(passes=1, **flags)
    twin.load_state_dict({name.replace(".net.", "."): value for name, value in rule.state_dict().items()})
    return twin


def moved(rule):
    """Weights away from their start, where the level changes nothing."""
    for parameter in rule.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return rule


@torch.no_grad()
def test_a_loop_is_that_of_as_many_plain_steps():
    rule = moved(rule_of(objective="full"))
    model, twin = rule.model, plain_twin(rule, objective="full").model
    assert torch.equal(model(text(), 2), twin(text(), 2 * PASSES))
    assert not torch.equal(model(text(), 2), twin(text(), 2))


@torch.no_grad()
def test_one_network_evaluation_of_a_denoiser_is_that_of_as_many_steps_at_its_level():
    flags = {"objective": "denoise", "denoise.context": "inject"}
    rule = moved(rule_of(**flags)).double()
    model, twin = rule.model, plain_twin(rule, **flags).model.double()
    e, level = model.encode(text()), torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    state = torch.randn(3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = state
    for _ in range(PASSES):
        expected = twin.step(expected, e, level)
    assert torch.equal(model.step(state, e, level), expected)
    assert not torch.equal(model.step(state, e, level), model.step(state, e, 2 * level))


@pytest.mark.parametrize("flags", RULES.values(), ids=RULES)
def test_training_costs_the_layers_that_run_and_reaches_every_weight(flags):
    rule, runs = rule_of(**flags), []
    for layer in rule.modules():
        if isinstance(layer, TransformerLayer):
            layer.register_forward_hook(lambda *_: runs.append(3 if torch.is_grad_enabled() else 1))
    steps = 32 if "carry" in str(flags) else 2  # in half of them the blocks above are run
    for step in range(steps):
        rule(text(), StepRandom(0, step, count=3)).value.backward()
        rule.after_step()
    recorded = 3 if flags.get("denoise.context") == "concat" else 0  # of a coda of one layer clean rows need only keys
    drawn = 0.5 if "carry" in str(flags) else 0
    assert rule.layer_forwards() - recorded == pytest.approx(sum(runs) / steps, abs=drawn)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rule.parameters() if p.requires_grad)


def test_a_pass_more_costs_the_flops_of_the_core_and_no_weight():
    config = load_config(None, SMALL | {"objective": "denoise", "denoise.context": "inject"})
    one, two, three = (count(config.replace(**{"model.core_passes": passes}), VOCAB) for passes in (1, 2, 3))
    assert three.step_flops - two.step_flops == two.step_flops - one.step_flops > 0
    assert one.parameters == two.parameters == three.parameters
    assert [each.effective_parameters - one.parameters for each in (one, two, three)] == [
        0, one.core_parameters, 2 * one.core_parameters]


def test_each_pass_has_its_own_keys_and_the_context_is_shared():
    class Seen(nn.Module):
        def forward(self, state, e, cond, rows):
            paths.append(rows)
            return state + e

    class Path(tuple):
        def in_pass(self, number):
            return Path((*self, number))

    paths, state = [], torch.ones(1, 1, 2)
    assert torch.equal(Passes(Seen(), 3)(state, state, None, Path(("step",))), 4 * state)
    assert paths == [("step", 0), ("step", 1), ("step", 2)]


def test_fewer_than_one_pass_is_refused():
    with pytest.raises(UserError, match="num 0 is below 1"):
        Passes(nn.Identity(), 0)
    with pytest.raises(UserError, match=r"model\.core_passes"):
        load_config(None, {"model.core_passes": 0})
