"""The autoregressive twin is the loop unrolled once: same loss, same gradients, and its cost is a single pass."""

import torch

from looped.config import load_config
from looped.models.build import build
from looped.objectives import build_objective, trained_depths
from looped.rng import StepRandom

SMALL = {"model.width": 16, "model.num_heads": 2}


def make(objective, **flags):
    config = load_config(None, SMALL | {"objective": objective} | flags)
    return config, build_objective(config, build(config, 30))


def test_the_twin_is_a_full_unroll_of_one_step():
    tokens = torch.randint(30, (3, 9), generator=torch.Generator().manual_seed(0))
    gradients = []
    for name, flags in (("ar", {}), ("full", {"recurrence.mean": 1})):
        _, rule = make(name, **flags)
        loss = rule(tokens, StepRandom(0, 0, count=3)).value
        gradients.append([loss, *torch.autograd.grad(loss, list(rule.parameters()))])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_the_twin_costs_what_a_denoiser_costs_and_is_trained_at_depth_one():
    (config, twin), (_, denoise) = make("ar"), make("denoise")
    assert twin.layer_forwards() == denoise.layer_forwards()
    assert trained_depths(config) == (1, 1)


def test_the_twin_has_the_parameters_of_the_denoisers_model_without_its_conditioning():
    twin = dict(make("ar")[1].model.named_parameters())
    denoise = {name: p for name, p in make("denoise")[1].model.named_parameters() if "modulation" not in name
               and "level_embedding" not in name}
    assert twin.keys() == denoise.keys()
    assert all(twin[name].shape == denoise[name].shape for name in twin)
