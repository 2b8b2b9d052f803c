"""Optimisers, schedule and averaged weights: who gets which update, and that the updates are torch's."""

import copy
import math

import pytest
import torch
from torch import nn

from looped.config.training import OptimConfig
from looped.models.build import build
from looped.objectives import build_objective
from looped.training.optim import EMA, build_optimizers, decayed_parameters, hidden_matrices, lr_factor, set_lr


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 11)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def small():
    torch.manual_seed(0)
    return Small()


def step_loss(module, seed):
    tokens = torch.randint(11, (5, 7), generator=torch.Generator().manual_seed(seed))
    return module(tokens).square().mean()


def objective_of(config):
    return build_objective(config, build(config, 270))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("objective", ["truncated", "denoise"])
def test_every_trainable_parameter_is_optimised_once(tiny, name, objective):
    module = objective_of(tiny(objective=objective, **{"optim.name": name}))
    optimizers = build_optimizers(module, OptimConfig(name=name))
    taken = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(id(p) for p in module.parameters() if p.requires_grad)


def test_vectors_and_lookup_tables_do_not_decay_and_matrices_do(tiny):
    module = objective_of(tiny(**{"denoise.target.learned_logit_scale": True}))
    decayed = decayed_parameters(module)
    shapes = {name: p.ndim for name, p in module.named_parameters()}
    assert not {name for name in decayed if shapes[name] < 2}
    assert {name for name in shapes if shapes[name] >= 2} - decayed == {
        "denoiser.model.embed.weight", "denoiser.targets.weight"}


def test_muon_takes_the_matrices_of_the_layers_and_nothing_that_touches_data(tiny):
    module = objective_of(tiny(**{"model.tie_embeddings": False}))
    hidden = hidden_matrices(module)
    assert "denoiser.model.prelude.0.attn.q.weight" in hidden
    assert any("recurrence" in name for name in hidden)
    assert not [name for name in hidden if any(part in name for part in (
        "embed", "head", "in_proj", "targets", "bias", "norm"))]


def test_adamw_is_torch_adamw_with_two_groups():
    ours, plain = small(), small()
    config = OptimConfig(lr=0.01, weight_decay=0.3)
    optimizers = build_optimizers(ours, config)
    decayed = [p for name, p in plain.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in plain.named_parameters() if p.ndim < 2 or "embed" in name]
    oracle = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}],
                               lr=0.01, betas=config.betas, foreach=False)
    for seed in range(5):
        step_loss(ours, seed).backward()
        step_loss(plain, seed).backward()
        for optimizer in [*optimizers, oracle]:
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_muon_is_torch_muon_on_the_layers_and_adamw_elsewhere():
    ours, plain = small(), small()
    config = OptimConfig(name="muon", muon_lr=0.02, lr=0.01, weight_decay=0.1)
    optimizers = build_optimizers(ours, config)
    matrices = [layer.weight for layer in plain.layers]
    ids = {id(p) for p in matrices}
    oracle = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1),
              torch.optim.AdamW([plain.head.weight], lr=0.01, betas=config.betas, weight_decay=0.1),
              torch.optim.AdamW([p for p in plain.parameters() if id(p) not in ids and p is not plain.head.weight],
                                lr=0.01, betas=config.betas, weight_decay=0.0)]
    for seed in range(3):
        step_loss(ours, seed).backward()
        step_loss(plain, seed).backward()
        for optimizer in [*optimizers, *oracle]:
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_warmup_is_linear_in_steps_and_reaches_the_peak():
    config = OptimConfig(schedule="constant", warmup_steps=4)
    assert [lr_factor(0.0, step, config) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_the_peak_to_the_floor():
    config = OptimConfig(schedule="cosine", warmup_steps=0, min_lr_fraction=0.1)
    assert [lr_factor(p, 9, config) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.55, 0.1])
    assert lr_factor(1.7, 9, config) == pytest.approx(0.1)  # a budget that was overshot


def test_wsd_is_flat_then_decays_linearly():
    config = OptimConfig(schedule="wsd", warmup_steps=0, decay_fraction=0.2, min_lr_fraction=0.0)
    assert [lr_factor(p, 9, config) for p in (0.0, 0.8, 0.9, 1.0)] == pytest.approx([1.0, 1.0, 0.5, 0.0], abs=1e-12)
    never = config.model_copy(update={"decay_fraction": 0.0})
    assert lr_factor(1.0, 9, never) == 1.0


def test_set_lr_scales_each_groups_own_peak():
    optimizers = build_optimizers(small(), OptimConfig(name="muon", lr=0.1, muon_lr=0.4))
    set_lr(optimizers, 0.5)
    set_lr(optimizers, 0.25)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    assert sorted(set(rates)) == [0.025, 0.1]


def test_averaged_weights_follow_the_recurrence_and_swap_in_and_out():
    module = nn.Linear(3, 2, bias=False)
    ema, expected = EMA(module, 0.5), copy.deepcopy(module.weight.detach())
    module.weight.grad = torch.zeros_like(module.weight)
    for step in range(6):
        nn.init.normal_(module.weight)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
        ema.update(module, step)
    before = module.weight.detach().clone()
    with ema.applied(module):
        torch.testing.assert_close(module.weight.detach(), expected)
    assert torch.equal(module.weight, before)
    assert not math.isclose(before.sum().item(), expected.sum().item())  # the two differ, so the swap was seen


def test_the_average_of_a_block_is_over_the_steps_that_it_was_at_work():
    module = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
    ema, alone = EMA(module, 0.05), EMA(module[0], 0.05)
    for step in range(6):
        at_work = step % 2
        nn.init.normal_(module[at_work].weight)
        module[at_work].weight.grad, module[1 - at_work].weight.grad = torch.zeros(2, 2), None
        ema.update(module, step)
        if at_work == 0:
            alone.update(module[0], step)
    assert torch.equal(ema.averages[0], alone.averages[0])
    assert not torch.allclose(ema.averages[0], ema.averages[1])
