"""The warning on a loop's state names exactly the configs whose state grows at initialisation, or ignores its input."""

import itertools

import pytest
import torch

from looped.config import load_config
from looped.evaluation.state_stats import StateStats, growth
from looped.models.build import build
from looped.objectives.degenerate_loops import cautions

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

INJECTIONS = ("none", "add", "linear", "gated", "diagonal")
TOKENS = torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(0))


def config_of(injection, block, state_init="zero", objective="full"):
    return load_config(None, {"objective": objective, "model.width": 32, "model.num_heads": 2, "recurrence.mean": 4,
                              "model.injection": injection, "model.block": block, "model.state_init": state_init})


def states(config, tokens, depth=128):
    model, motion = build(config, 20), StateStats()
    e = model.encode(tokens)
    noise = torch.randn(e.shape, generator=torch.Generator().manual_seed(1)) if model.recurrence.needs_noise else None
    with torch.no_grad():
        model.unroll(e, grad=depth, noise=noise, callback=lambda _, state: motion.take(state))
    return motion


@pytest.mark.parametrize(("injection", "block"), itertools.product(INJECTIONS, ("prenorm", "sandwich")))
def test_the_warning_is_given_where_the_state_grows_and_nowhere_else(injection, block):
    config = config_of(injection, block, "embedding")
    sizes = {depth: size.mean().item() for depth, size in enumerate(states(config, TOKENS).sizes, start=1)}
    assert bool(cautions(config)) == bool(growth(sizes))


@pytest.mark.parametrize("state_init", ["zero", "like-init", "noise", "embedding"])
def test_a_loop_that_never_reads_its_input_is_warned_of(state_init):
    config = config_of("none", "sandwich", state_init)
    ends = [states(config, tokens, depth=3).latent for tokens in (TOKENS, TOKENS.roll(1, 0))]
    assert torch.equal(*ends) == any("never reads its input" in caution for caution in cautions(config))


@pytest.mark.parametrize("objective", ["ar", "denoise", "masked"])
def test_rules_that_do_not_unroll_are_not_warned(objective):
    assert cautions(config_of("add", "prenorm", objective="full"))  # positive control
    assert cautions(config_of("add", "prenorm", objective=objective)) == []
