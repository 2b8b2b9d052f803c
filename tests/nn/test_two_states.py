"""TRM's core: a step of its two states by hand, its runs counted, and one part of the state that is decoded."""

import math

import pytest
import torch
from torch import nn

from looped import Core, RecurrentDepth
from looped.config import load_config
from looped.data.task_data import prepare_task
from looped.errors import UserError
from looped.inference.exits import Exit
from looped.inference.generate import generate
from looped.inference.rollout import answer, rollout_of
from looped.models.build import build
from looped.nn.layers import TransformerLayer
from looped.nn.masks import Full
from looped.nn.rows import Rows
from looped.nn.two_states import TwoStates
from looped.objectives import build_objective
from looped.objectives.degenerate_loops import cautions
from looped.rng import StepRandom

VOCAB, WIDTH, HEADS, UPDATES = 11, 16, 2, 3
TRM = {"model.width": WIDTH, "model.num_heads": HEADS, "model.num_prelude_layers": 0, "model.num_core_layers": 2,
       "model.num_coda_layers": 0, "model.latent_updates": UPDATES, "model.block": "original", "model.injection": "add",
       "model.state_init": "vector", "model.loop_norm": "none", "model.tie_embeddings": False, "recurrence.mean": 2,
       "supervision.segments": 2, "fixed_point.max_steps": 3}
RULES = ("full", "truncated", "progressive", "one-step", "fixed-point", "ar")


def rule_of(objective="one-step", **flags):
    config = load_config(None, TRM | {"objective": objective} | flags)
    return build_objective(config, build(config, VOCAB)).train()


def text(rows=3, length=7):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def draws(count=3, step=0):
    return StepRandom(0, step, count=count)


# ---- by hand, from the equations, in plain operations

def normed(x, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def turned(x):
    """Rotary positions of (B, L, H, K), halves convention."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[1])[:, None] * frequencies.float().double()  # rounded, as those of the model
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def net(weights, x):
    """TRM's net: `x = norm(x + attention(x)); x = norm(x + swiglu(x))`, twice."""
    for number in range(2):
        w = {name: weights[f"recurrence.core.blocks.0.net.layers.{number}.{name}.weight"]
             for name in ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.in_", "mlp.out")}
        q, k, v = ((x @ w[f"attn.{name}"].T).unflatten(-1, (HEADS, -1)) for name in "qkv")
        scores = torch.einsum("bqhk,bmhk->bhqm", turned(q), turned(k)) / math.sqrt(WIDTH // HEADS)
        mixed = torch.einsum("bhqm,bmhk->bqhk", scores.softmax(-1), v).flatten(-2)
        x = normed(x + mixed @ w["attn.out"].T)
        gate, up = (x @ w["mlp.in_"].T).chunk(2, -1)
        x = normed(x + (gate * torch.sigmoid(gate) * up) @ w["mlp.out"].T)
    return x


@torch.no_grad()
def test_a_loop_is_that_of_the_published_equations():
    model = rule_of().model.double()
    for parameter in model.recurrence.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    weights, rows, tokens = model.state_dict(), Rows(mask=Full()), text()
    x = math.sqrt(WIDTH) * weights["embed.weight"][tokens]
    y, z = (vector.expand_as(x) for vector in weights["recurrence.vectors"])
    for _ in range(2):
        for _ in range(UPDATES):
            z = net(weights, z + y + x)
        y = net(weights, y + z)
    state = model.unroll(model.encode(tokens, rows), rows, grad=2)
    assert torch.allclose(state, torch.cat([y, z], -1), rtol=1e-9, atol=1e-9)
    assert torch.allclose(model.decode(state, rows), normed(y) @ weights["head.weight"].T, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(y, z, atol=0.1)


# ---- rules

@pytest.mark.parametrize("objective", RULES)
def test_every_unrolled_rule_trains_it_and_its_cost_is_what_the_layers_run(objective):
    rule, runs = rule_of(objective, **{"fixed_point.solver": "fixed_point_iter", "fixed_point.tol": 0.0,
                                       "recurrence.distribution": "fixed", "recurrence.backprop": 1}), []
    for layer in rule.model.recurrence.core.blocks[0].net.layers:
        layer.register_forward_hook(lambda *_: runs.append(3 if torch.is_grad_enabled() else 1))
    costs = []
    for step in range(16 if objective == "progressive" else 1):  # whose depths are drawn
        runs.clear()
        rule(text(), draws(step=step)).value.backward()
        rule.after_step()
        costs.append(sum(runs))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rule.parameters() if p.requires_grad)
    assert rule.layer_forwards() == pytest.approx(sum(costs) / len(costs), rel=0.2 if objective == "progressive" else 0)
    assert costs[0] % (2 * (UPDATES + 1)) == 0


@pytest.mark.parametrize("objective", RULES)
@torch.no_grad()
def test_rollouts_run_it_to_any_depth(objective):
    rollout = rollout_of(rule_of(objective).eval())
    found = rollout.losses(text(), [1, 3], draws())
    assert [depth for depth, *_ in found] == [1, 3]
    assert not torch.equal(found[0][1], found[1][1])
    assert rollout.likelihood_cost(3).spent(torch.full((1, 3), 3))[0].tolist() == [3 * 2 * (UPDATES + 1)] * 3


def test_the_answer_alone_is_decoded_and_judged():
    rule = rule_of(**{"model.exit_gate": True})
    nn.init.normal_(rule.halt.weight)
    nn.init.normal_(rule.model.exit_gate.weight)
    batch, state = rule.ask(text()), torch.randn(3, 6, 2 * WIDTH)
    readings = (rule.model.decode, rule.model.exit_gate, lambda state: rule.halt_logit(state, batch))
    for half, moves in ((slice(WIDTH), True), (slice(WIDTH, None), False)):
        changed = state.clone()
        changed[..., half] += torch.randn(WIDTH)
        assert all(torch.equal(read(changed), read(state)) != moves for read in readings)


@torch.no_grad()
def test_text_is_written_with_cached_keys_as_without():
    rule, prompt = rule_of("full").eval(), text(2, 3)
    written = generate(rule, prompt, num_tokens=6, depth=2, temperature=0.0)
    for _ in range(6):
        prompt = torch.cat([prompt, rule.model(prompt, 2)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written[:, -6:], prompt[:, -6:])


@pytest.mark.parametrize("exit", ["head", "latent=0.5"])
@torch.no_grad()
def test_puzzles_are_solved_with_exits(exit):
    config = load_config(None, TRM | {"objective": "one-step", "task.name": "prefix-sums", "task.difficulty": [4, 4]})
    data = prepare_task(config.task)
    rule = build_objective(config, build(config, data.vocab_size)).eval()
    batch = data.train.batch(0, batch_size=3, seed=0)
    whole, early = answer(rule, batch, [2, 4], config), answer(rule, batch, [4], config, exit=Exit.of(exit))
    assert whole[4].layer_forwards.tolist() == [4 * 2 * (UPDATES + 1)] * 3
    assert (early[4].used <= 4).all()


@pytest.mark.parametrize("objective", ["denoise", "blockwise", "masked"])
def test_rules_that_run_no_loop_refuse_it(objective):
    with pytest.raises(UserError, match=r"model.latent_updates 6 is a second state of a loop"):
        load_config(None, {"objective": objective, "model.latent_updates": 6,
                           "blocks.num": 2 if objective == "blockwise" else 1})


# ---- the start

def test_each_state_starts_from_its_own_vector_in_all_rows_which_is_kept_with_the_weights():
    model, other = rule_of().model, rule_of(seed=1).model
    start = model.initial_state(model.encode(text()))
    assert start.shape == (3, 7, 2 * WIDTH)
    assert torch.equal(start, start[:1, :1].expand_as(start))
    assert not torch.equal(*start[0, 0].chunk(2))
    assert torch.equal(model.recurrence.vectors, rule_of().model.recurrence.vectors)
    assert not torch.equal(model.recurrence.vectors, other.recurrence.vectors)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.initial_state(model.encode(text())), start)


class Shift(nn.Module):
    def forward(self, state, e, cond=None):
        return state + e


def test_a_vector_has_unit_variance_within_two_deviations_and_needs_a_width():
    (vector,) = RecurrentDepth(Core(Shift()), state_init="vector", width=40_000).vectors
    assert vector.std().item() == pytest.approx(1, abs=0.02)
    assert vector.abs().max().item() == pytest.approx(2 / 0.8796, abs=0.01)
    with pytest.raises(UserError, match="state_init vector draws a vector, and its width is not given; pass width="):
        RecurrentDepth(Core(Shift()), state_init="vector")
    assert "vectors" not in RecurrentDepth(Core(Shift())).state_dict()


def test_in_a_loop_of_its_own_it_takes_any_block():
    e = torch.randn(2, 5, 4)
    loop = RecurrentDepth(Core(TwoStates(Shift(), updates=2)), state_init="embedding")
    y, z = loop(e, 1).chunk(2, -1)
    assert torch.allclose(z, e + 2 * (e + e))  # z <- z + (y + e), twice
    assert torch.allclose(y, e + z)
    with pytest.raises(UserError, match="updates"):
        TwoStates(Shift(), updates=0)


def test_both_states_start_alike_otherwise():
    for start, scale in (("embedding", 1.0), ("zero", 0.0)):
        model = rule_of(**{"model.state_init": start}).model
        e = model.encode(text())
        assert torch.equal(model.initial_state(e), scale * torch.cat([e, e], -1))
    model = rule_of(**{"model.state_init": "noise", "model.state_std": 2.0}).model
    noise = torch.randn(3, 7, WIDTH)
    assert torch.equal(model.initial_state(e, noise), 2 * torch.cat([noise, noise], -1))


def test_a_custom_core_is_the_net_of_both_updates(tmp_path, monkeypatch):
    (tmp_path / "shifting.py").write_text("from torch import nn\n\n\nclass Net(nn.Module):\n"
                                          "    def __init__(self, width, num_layers, cond_width):\n"
                                          "        super().__init__()\n        self.mix = nn.Linear(width, width)\n\n"
                                          "    def forward(self, state, e, cond):\n"
                                          "        return self.mix(state + e)\n", encoding="utf-8", newline="\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = rule_of("full", **{"model.core": "shifting.Net"}).model
    e, state = torch.randn(2, 4, WIDTH), torch.randn(2, 4, 2 * WIDTH)
    y, z = state.chunk(2, -1)
    mix = model.recurrence.core.blocks[0].net.block.mix
    for _ in range(UPDATES):
        z = mix(z + y + e)
    assert torch.allclose(model.step(state, e), torch.cat([mix(y + z), z], -1), atol=1e-6)


# ---- the layer

def test_the_original_layer_norms_the_sum_alone():
    layer = TransformerLayer(WIDTH, HEADS, 32, block="original")
    x = torch.randn(2, 5, WIDTH)
    model = rule_of().model
    rows = model.placed(x, Rows())
    x1 = normed(x + layer.attn(x, rows))
    assert torch.allclose(layer(x, None, rows), normed(x1 + layer.mlp(x1)), atol=1e-5)
    with pytest.raises(UserError, match="block original has no norm before its branches"):
        TransformerLayer(WIDTH, HEADS, 32, block="original", cond_width=8)


@pytest.mark.parametrize(("block", "faults"), [("original", 0), ("prenorm", 1)])
def test_its_norm_keeps_the_state_bounded_under_the_injection_add(block, faults):
    assert len(cautions(load_config(None, TRM | {"objective": "full", "model.block": block}))) == faults
