"""What a training step of a denoiser may hold beside one reading: several solver steps, what a step hands on, levels by
token, the plain loss, blocks of tokens. Each setting against its definition written out; all of them together leak
nothing."""

import itertools

import pytest
import torch

from looped.config import load_config
from looped.data.batch import Batch
from looped.diffusion.clean_estimate import bridge
from looped.diffusion.denoiser import Trajectory
from looped.diffusion.samplers import sample_ancestral
from looped.models.build import build
from looped.nn.layers import TransformerLayer
from looped.nn.rows import PLAIN, Rows
from looped.objectives import build_objective
from looped.objectives import denoise as rule
from looped.objectives.base import token_losses
from looped.rng import StepRandom, generator

V, L, B, DIM = 20, 12, 2, 8
SMALL = {"model.width": 16, "model.num_heads": 2, "model.ffn_width": 16, "denoise.target.dim": DIM, "data.length": L,
         "denoise.cond_width": 8, "evaluation.prompt_length": 4}
CARRIES = ["none", "estimate", "latent"]
ALL = {"denoise.block_size": 3, "denoise.train_steps": 2, "denoise.carry": "latent"}


def make(awake=True, **flags):
    """An objective; `awake`: what starts at zero, where it would hide a path, is random."""
    config = load_config(None, SMALL | {f"denoise.{name}".replace("__", "."): value for name, value in flags.items()})
    return wake(build_objective(config, build(config, V))) if awake else build_objective(config, build(config, V))


@torch.no_grad()
def wake(objective):
    for name, parameter in objective.named_parameters():
        if any(part in name for part in ("modulation", "place", "carry_proj")):
            parameter.normal_(generator=generator(name), std=0.3)
    return objective


def settings(flags):
    return {name.removeprefix("denoise."): value for name, value in flags.items()}


def tokens():
    return torch.randint(V, (B, L + 1), generator=generator("tokens"))


def random_of(step=0, count=B):
    return StepRandom(0, step, count=count)


def step_with(first_reading):
    """The first step in which a first reading hands something on, or in which it does not."""
    return next(step for step in itertools.count() if first_reading == (
        float(torch.rand((), generator=random_of(step).lockstep("carry"))) < 0.5))


@pytest.fixture
def float64(monkeypatch):
    """The float32 that the objective asks for by name is float64, so that a difference quotient settles an argument."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


# ---- several solver steps


def difference_quotient(objective, parameter, direction, step=1e-5):
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            parameter.add_(direction, alpha=sign * step)
            values.append(objective(tokens(), random_of()).value.item())
        parameter.add_(direction, alpha=step)
    return (values[0] - values[1]) / (2 * step)


def slopes(objective):
    """{name: (autograd's, the difference quotient's)} slope of the loss along a random direction."""
    value = objective(tokens(), random_of()).value
    names = ("denoiser.in_proj.weight", "denoiser.targets.weight", "denoiser.log_logit_scale", "model.embed.weight",
             "core.blocks.0.layers.1.attn.v.weight", "coda.0.mlp.in_.weight")
    chosen = {name: p for name, p in objective.named_parameters() if name.endswith(names)}
    assert len(chosen) == len(names)
    found = {}
    for name, gradient in zip(chosen, torch.autograd.grad(value, list(chosen.values())), strict=True):
        direction = torch.randn(gradient.shape, generator=generator(name), dtype=torch.float64)
        found[name] = (gradient * direction).sum().item(), difference_quotient(objective, chosen[name], direction)
    return found


@pytest.mark.parametrize("carry", CARRIES)
def test_the_gradient_of_two_steps_is_that_of_the_loss(carry, float64, unchecked):
    for name, (exact, quotient) in slopes(make(train_steps=2, carry=carry).double()).items():
        assert exact == pytest.approx(quotient, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize(("carry", "cut"), [("none", "bridge"), ("estimate", "handed_on"),
                                             ("latent", "handed_on")])
def test_a_gradient_cut_between_the_steps_is_seen(carry, cut, float64, unchecked, monkeypatch):
    """Positive control: the estimate that z steps to, or what is handed on, without the gradient of the first step."""
    objective = make(train_steps=2, carry=carry).double()
    owner = rule if cut == "bridge" else objective.denoiser
    whole = getattr(owner, cut)
    monkeypatch.setattr(owner, cut, lambda *args: whole(*args).detach())
    off = [abs(exact - quotient) / abs(quotient) for exact, quotient in slopes(objective).values()]
    assert max(off) > 1e-2
    assert sum(each > 1e-4 for each in off) >= 4


@torch.no_grad()
@pytest.mark.parametrize("context", ["context", "concat"])
@pytest.mark.parametrize("carry", CARRIES)
def test_two_trained_steps_are_those_of_the_ancestral_solver(carry, context, monkeypatch):
    objective = make(train_steps=2, carry=carry, context=context, noise__share_at_max=1.0)
    denoiser, (x, y) = objective.denoiser, (tokens()[:, :-1], tokens()[:, 1:])
    trained, trace = [], denoiser.trace
    monkeypatch.setattr(denoiser, "trace", lambda z, *args, **kwargs: trained.append(z) or trace(z, *args, **kwargs))
    value = objective(tokens(), random_of()).value

    e = objective.model.encode(x)
    walk, readings, solved = Trajectory(denoiser), [], []

    def denoise(z, sigma):
        sigma = torch.full((B,), sigma, dtype=torch.float64)
        readings.append(walk(z, sigma, e, Rows(context=objective.model.make_context(e, context))))
        return bridge("soft", readings[-1], denoiser.table())

    high, half = objective.noise.sigma_max, objective.noise.continuous.quantile(0.5).item()
    z = denoiser.target(y) + high * random_of().normal("noise", (L, DIM))
    sample_ancestral(denoise, z, torch.tensor([high, half, 0], dtype=torch.float64),
                     callback=lambda step, sigma, z, D: solved.append(z),
                     random=lambda step: random_of().normal(f"noise{step + 1}", (L, DIM)))
    torch.testing.assert_close(trained, solved, rtol=1e-5, atol=1e-5)
    by_hand = torch.stack([token_losses(logits, y) for logits in readings]).mean()
    torch.testing.assert_close(value, by_hand, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_trained_step_is_the_plain_loss():
    objective = make(train_steps=1)
    x, y = tokens()[:, :-1], tokens()[:, 1:]
    sigma = objective.levels(random_of(), L)
    z = objective.denoiser.target(y) + sigma.float()[:, None, None] * random_of().normal("noise", (L, DIM))
    plain = token_losses(objective.logits(x, z, sigma), y).mean()
    torch.testing.assert_close(objective(tokens(), random_of()).value, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("noise", ["log-uniform", "log-normal"])
def test_trained_levels_are_even_parts_of_the_mass_below_the_first(noise):
    objective = make(train_steps=4, noise__distribution=noise, noise__share_at_max=0.3)
    levels = torch.stack(objective._falling(objective.levels(random_of(count=50), L)))
    mass = objective.noise.continuous.cdf(levels)
    torch.testing.assert_close(mass / mass[:1], torch.tensor([1, 0.75, 0.5, 0.25]).double().view(
        -1, *[1] * (mass.ndim - 1)).expand_as(mass), rtol=1e-6, atol=1e-6)
    assert (levels.diff(dim=0) < 0).all()


# ---- what a step hands on


@torch.no_grad()
@pytest.mark.parametrize("train_steps", [1, 2])
@pytest.mark.parametrize("carry", ["estimate", "latent"])
def test_at_first_nothing_is_handed_on(carry, train_steps):
    for step in (step_with(True), step_with(False)):
        plain, carried, awake = (make(train_steps=train_steps, carry=kind, awake=awake)(
            tokens(), random_of(step)).value for kind, awake in (("none", False), (carry, False), (carry, True)))
        assert torch.equal(plain, carried)
        assert not torch.allclose(plain, awake, atol=1e-4)  # positive control: these weights are not blind


@torch.no_grad()
@pytest.mark.parametrize("carry", ["estimate", "latent"])
def test_a_walk_reads_with_what_the_reading_before_handed_on(carry):
    objective = make(carry=carry)
    denoiser, e = objective.denoiser, objective.model.encode(tokens()[:, :-1])
    rows = Rows(context=objective.model.make_context(e, "context"))
    first, second = (5 * torch.randn(B, L, DIM, generator=generator(name)) for name in ("first", "second"))
    high, low = (torch.full((B,), sigma, dtype=torch.float64) for sigma in (5.0, 2.0))
    outputs = []
    objective.model.recurrence.core.register_forward_hook(lambda module, args, output: outputs.append(output))

    walk = Trajectory(denoiser)
    logits = walk(first, high, e, rows)
    by_hand = {"estimate": logits.softmax(-1) @ denoiser.table() / denoiser.edm.sigma_data, "latent": outputs[0]}[carry]
    again = walk(second, low, e, rows)
    torch.testing.assert_close(again, denoiser.read(second, low, e, rows, carry=by_hand)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(again, denoiser(second, low, e, rows), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("carry", ["estimate", "latent"])
def test_a_step_trains_on_what_its_own_first_reading_hands_on(carry):
    objective, (x, y) = make(carry=carry), (tokens()[:, :-1], tokens()[:, 1:])
    denoiser, e = objective.denoiser, objective.model.encode(x)
    values = {}
    for first_reading in (True, False):
        random = random_of(step_with(first_reading))
        sigma = objective.levels(random, L)
        z = denoiser.target(y) + sigma.float()[:, None, None] * random.normal("noise", (L, DIM))
        walk, rows = Trajectory(denoiser), Rows(context=objective.model.make_context(e, "context"))
        readings = [token_losses(walk(z, sigma, e, rows), y).mean() for _ in range(2)]
        values[first_reading] = objective(tokens(), random).value, readings
        assert abs(readings[0] - readings[1]) > 1e-3
    torch.testing.assert_close(values[True][0], values[True][1][1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values[False][0], values[False][1][0], rtol=1e-5, atol=1e-5)


def test_half_of_the_steps_have_a_first_reading_without_gradient_the_same_ones_on_every_process(monkeypatch, unchecked):
    objective, modes = make(carry="estimate"), []
    monkeypatch.setattr(objective.denoiser, "read",
                        lambda *args, **options: (modes.append(torch.is_grad_enabled()), "something"))
    z = torch.zeros(B, L, DIM)

    def handed_on(start, num_steps):
        return [objective._carry_of_a_first_reading(z, z, z, StepRandom(0, step, start=start, count=B), PLAIN)
                for step in range(num_steps)]

    whole = handed_on(0, 1000)
    assert abs(whole.count("something") - 500) < 60  # 3.8 standard deviations
    assert whole.count(None) + whole.count("something") == 1000
    assert whole[:100] == handed_on(2, 100)
    assert not any(modes)


# ---- all of it


def moved(objective, start, step=0):
    """Which rows' losses move where the clean token `start` does and the noisy rows' own tokens do not."""
    x, y, random = tokens()[:, :-1], tokens()[:, 1:], random_of(step)
    other = x.clone()
    other[:, start] = (other[:, start] + 1) % V
    sigma = objective.levels(random, L)
    before, after = (objective._losses(objective.model.encode(rows), Batch(rows, y), sigma, random, PLAIN)
                     for rows in (x, other))
    return ((before - after).abs().amax(0) > 1e-9).tolist()


@torch.no_grad()
@pytest.mark.parametrize("context", ["context", "concat"])
@pytest.mark.parametrize("flags", [{"denoise.carry": "estimate"}, {"denoise.carry": "latent"},
                                   {"denoise.train_steps": 3}], ids=str)
def test_a_clean_token_reaches_the_rows_from_its_own_on_alone(flags, context, float64):
    objective = make(**settings(flags), context=context).double()
    assert moved(objective, 4, step_with(True)) == [row >= 4 for row in range(L)]  # the later rows: positive control


@torch.no_grad()
@pytest.mark.parametrize("context", ["context", "concat"])
@pytest.mark.parametrize("carry", ["estimate", "latent"])
@pytest.mark.parametrize("train_steps", [1, 2])
def test_a_clean_token_reaches_the_blocks_after_it_alone(train_steps, carry, context, float64):
    flags = ALL | {"denoise.train_steps": train_steps, "denoise.carry": carry, "denoise.context": context}
    assert moved(make(**settings(flags)).double(), 4, step_with(True)) == [row >= 6 for row in range(L)]


@torch.no_grad()
@pytest.mark.parametrize("train_steps", [1, 2])
def test_a_leak_through_what_is_handed_on_is_seen(train_steps, float64, monkeypatch):
    objective = make(carry="latent", train_steps=train_steps).double()
    whole = objective.denoiser.handed_on
    monkeypatch.setattr(objective.denoiser, "handed_on", lambda *args: whole(*args) + whole(*args).mean(1, True))
    assert all(moved(objective, 4, step_with(True)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("context", ["context", "concat"])
@pytest.mark.parametrize("flags", [*({"denoise.carry": kind, "denoise.train_steps": num} for kind in CARRIES
                                     for num in (1, 2)), ALL], ids=str)
def test_every_parameter_has_a_gradient_in_every_step(flags, context, precision):
    """DDP waits for all of them. Under autocast a weight that was cast without gradient must not stay so."""
    objective = make(**settings(flags), context=context)
    for step in (step_with(True), step_with(False)):
        objective.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = objective(tokens(), random_of(step)).value
        value.backward()
        assert not [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]


def layers_run(objective, step):
    """Layers that run in a training step, a backward pass counting two; a layer that only shows its keys runs not."""
    cost = []
    for layer in objective.modules():
        if isinstance(layer, TransformerLayer):
            layer.register_forward_hook(lambda *_: cost.append(3 if torch.is_grad_enabled() else 1))
    objective(tokens(), random_of(step))
    return sum(cost)


COSTLY = [{}, {"denoise.train_steps": 3}, {"denoise.carry": "estimate"}, ALL, ALL | {"denoise.train_steps": 1}]


@pytest.mark.parametrize(("context", "flags"), [*(("inject", flags) for flags in COSTLY[:2]), *itertools.product(
    ["context", "concat"], COSTLY)], ids=str)
def test_layer_forwards_are_those_that_run(context, flags):
    run = sum(layers_run(make(**settings(flags), context=context), step_with(first)) for first in (True, False)) / 2
    assert make(**settings(flags), context=context).layer_forwards() == run
