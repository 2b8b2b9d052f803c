"""The rules beside plain unrolling: where their gradients flow, what their losses are by hand, and what they cost."""

import sys

import pytest
import torch
from torch.nn.functional import binary_cross_entropy, cross_entropy
from torchdeq.solver import get_solver

from looped.config import describe_settings, load_config
from looped.config.recurrence import FixedPointConfig
from looped.data.task_data import prepare_task
from looped.errors import UserError
from looped.inference.exits import Exit
from looped.inference.rollout import answer
from looped.models.build import build
from looped.objectives import OneStep, build_objective, trained_depths
from looped.objectives.base import rows_of_batch
from looped.objectives.fixed_point import Equilibrium
from looped.objectives.rule_depths import expected_progressive_depths, sample_progressive_depths
from looped.rng import StepRandom
from looped.training.optim import build_optimizers

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

VOCAB, ROWS = 30, 3
SMALL = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "recurrence.mean": 4}
BITS = {"task.name": "prefix-sums", "task.difficulty": [4, 4], "optim.lr": 3e-3, "optim.warmup_steps": 5}
RULES = {"full": {}, "progressive": {}, "one-step": {"supervision.segments": 3},
         "fixed-point": {"fixed_point.max_steps": 6}}


def config_of(objective, **flags):
    return load_config(None, SMALL | {"objective": objective} | flags)


def make(objective, **flags):
    config = config_of(objective, **flags)
    vocab = prepare_task(config.task).vocab_size if config.task.name else VOCAB
    return build_objective(config, build(config, vocab)).double().train()


def text():
    return torch.randint(VOCAB, (ROWS, 9), generator=torch.Generator().manual_seed(0))


def draw(step=0, **kwargs):
    return StepRandom(0, step, **({"count": ROWS} | kwargs))


def problems(rule_config, num=ROWS, step=0):
    return prepare_task(rule_config.task).train.batch(step, batch_size=num, seed=0)


def watch_steps(rule, monkeypatch):
    """A list that fills with (gradients are on, the state before has a gradient) of each loop step."""
    seen, step = [], rule.model.recurrence.step

    def watched(state, *args, **kwargs):
        seen.append((torch.is_grad_enabled(), state.requires_grad))
        return step(state, *args, **kwargs)

    monkeypatch.setattr(rule.model.recurrence, "step", watched)
    return seen


def read(rule, state):
    """Cross-entropy of each token of a text, from plain logits."""
    return cross_entropy(rule.model.decode(state).flatten(0, 1), text()[:, 1:].flatten())


def first_state(rule):
    e = rule.model.encode(text()[:, :-1])
    return e, rule.model.initial_state(e, draw().normal("state", e.shape[1:]))


# ---- full


def test_the_loss_on_every_step_is_the_mean_over_the_steps():
    rule = make("full", **{"recurrence.loss_on": "every"})
    e, state = first_state(rule)
    losses = []
    for _ in range(4):
        state = rule.model.step(state, e)
        losses.append(read(rule, state))
    assert rule(text(), draw()).value.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-9)
    assert losses[0].item() != pytest.approx(losses[-1].item(), rel=1e-3)  # a mean of equals would prove nothing
    assert rule.layer_forwards() == 3 * (1 + 4 + 4)


# ---- progressive


def test_progressive_takes_n_steps_without_gradient_and_k_with_it(monkeypatch):
    rule, seen_pairs = make("progressive"), set()
    seen = watch_steps(rule, monkeypatch)
    for step in range(12):
        n, k = sample_progressive_depths(4, draw(step))
        rule(text(), draw(step))
        assert [grad for grad, _ in seen] == [False] * n + [True] * k
        assert not any(carried for _, carried in seen[: n + 1])  # nothing flows back into the steps before
        assert all(carried for _, carried in seen[n + 1 :])
        seen_pairs.add((n, k))
        seen.clear()
    assert len(seen_pairs) > 4


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_of_progressive_is_the_weighted_sum_of_two_unrolls(weight):
    rule = make("progressive", **{"recurrence.progressive_weight": weight})
    n, k = sample_progressive_depths(4, draw())
    losses = []
    for depth in (n + k, 4):
        e, state = first_state(rule)
        for _ in range(depth):
            state = rule.model.step(state, e)
        losses.append(read(rule, state).item())
    loss = rule(text(), draw())
    assert loss.value.item() == pytest.approx(weight * losses[0] + (1 - weight) * losses[1], rel=1e-9)
    assert ("loss_full" in loss.metrics, "loss_progressive" in loss.metrics) == (weight < 1, weight > 0)


def test_progressive_draws_are_uniform_the_same_everywhere_and_have_the_stated_means():
    pairs = [sample_progressive_depths(5, draw(step)) for step in range(4000)]
    assert pairs[:50] == [sample_progressive_depths(5, draw(step, start=7, count=1)) for step in range(50)]
    n, k = torch.tensor(pairs, dtype=torch.float64).T
    assert (n.min(), n.max(), k.min(), (n + k).max()) == (0, 4, 1, 5)
    assert (n.mean().item(), k.mean().item()) == pytest.approx((2.0, 2.0), abs=0.08)
    assert n.unique(return_counts=True)[1].div(4000).tolist() == pytest.approx([0.2] * 5, abs=0.03)
    config = config_of("progressive", **{"recurrence.mean": 5})
    assert expected_progressive_depths(config.recurrence) == (2.0, 2.0)
    assert trained_depths(config) == (1, 5)


# ---- one-step


@pytest.mark.parametrize("steps", [0, 2])
def test_one_step_has_gradient_in_the_last_step_of_each_segment_alone(steps, monkeypatch):
    rule = make("one-step", **{"supervision.segments": 3, "supervision.steps": steps})
    seen = watch_steps(rule, monkeypatch)
    rule(text(), draw())
    assert seen == ([(False, False)] * steps + [(True, False)]) * 3


def test_the_loss_of_one_step_is_the_mean_over_segments_and_its_head_judges_the_answers():
    rule = make("one-step", **{"supervision.segments": 3, "supervision.steps": 1, "supervision.halt_weight": 0.7,
                               **BITS})
    torch.nn.init.normal_(rule.halt.weight, generator=torch.Generator().manual_seed(1))
    batch, model = problems(config_of("one-step", **BITS)), rule.model
    rows = rows_of_batch(batch)
    e = model.encode(batch.inputs, rows)
    state, total, judged = model.initial_state(e, draw().normal("state", e.shape[1:])), 0.0, []
    for _ in range(3):
        state = model.step(model.step(state, e, None, rows), e, None, rows)
        logits, sought = model.decode(state, rows)[:, 1:], batch.targets[:, 1:]  # the first cell is a marker
        right = (logits.argmax(-1) == sought).all(1)
        chance = torch.sigmoid(model.norm(state)[:, 1:].mean(1) @ rule.halt.weight[0] + rule.halt.bias)
        assert rule.halt_logit(state, batch).sigmoid().tolist() == pytest.approx(chance.tolist(), rel=1e-9)
        total += cross_entropy(logits.flatten(0, 1), sought.flatten())
        total += 0.7 * binary_cross_entropy(chance, right.double())
        judged += ((chance > 0.5) == right).tolist()
    loss = rule(batch, draw())
    assert bool(batch.scored[:, 1:].all())  # so that plain means are right
    assert loss.value.item() == pytest.approx(total.item() / 3, rel=1e-9)
    assert loss.metrics["halt_accuracy"].item() == pytest.approx(sum(judged) / len(judged))


def test_the_halting_head_sees_and_judges_the_rows_that_are_sought_alone():
    rule = make("one-step", **{"task.name": "copy"})
    torch.nn.init.normal_(rule.halt.weight, generator=torch.Generator().manual_seed(1))
    batch = problems(config_of("one-step", **{"task.name": "copy"}))
    state = torch.randn(*batch.inputs.shape, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    given, sought = state.clone(), state.clone()
    given[~batch.scored] += 1
    sought[batch.scored] += torch.arange(16.0)
    assert not batch.scored.all()
    assert torch.equal(rule.halt_logit(given, batch), rule.halt_logit(state, batch))
    assert not torch.allclose(rule.halt_logit(sought, batch), rule.halt_logit(state, batch))
    hidden = torch.nn.functional.one_hot(batch.targets, 16).double()
    rule.model.embed.weight.data = torch.eye(len(rule.model.embed.weight), 16, dtype=torch.float64)
    assert rule.is_right(hidden, batch).all()
    wrong = hidden.clone()
    wrong[~batch.scored] = hidden[~batch.scored].roll(1, -1)
    assert rule.is_right(wrong, batch).all()
    wrong[0, batch.scored[0].nonzero()[0]] = hidden[0, batch.scored[0].nonzero()[0]].roll(1, -1)
    assert rule.is_right(wrong, batch).tolist() == [False, True, True]


def test_depth_of_one_step_counts_core_steps():
    config = config_of("one-step", **{"supervision.segments": 3, "supervision.steps": 2})
    assert (config.main_depth, trained_depths(config)) == (9, (3, 9))
    rule = make("one-step", **{"supervision.segments": 3, "supervision.steps": 2})
    assert rule.layer_forwards() == 6 + 3 * (1 + 3 + 3)  # 6 steps without gradient; prelude, 3 steps, 3 codas with it


# ---- fixed points


def contraction(radius=0.9, size=6):
    """An affine map s -> W s + U of known spectral radius; W is not symmetric."""
    gen = torch.Generator().manual_seed(0)
    W = torch.randn(size, size, dtype=torch.float64, generator=gen)
    W = (radius * W / torch.linalg.eigvals(W).abs().max()).requires_grad_()
    return W, torch.randn(2, 3, size, dtype=torch.float64, generator=gen).requires_grad_()


def gradients(state, *parameters):
    target = torch.linspace(-1, 1, state.numel(), dtype=torch.float64).view_as(state)
    return torch.autograd.grad((state - target).square().sum(), parameters)


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
def test_the_implicit_gradient_is_the_exact_one(solver):
    """Against the closed form (I - W)^-1 U and against 400 unrolled steps; one phantom step is the positive control."""
    W, U = contraction()

    def found(**settings):
        config = FixedPointConfig(solver=solver, max_steps=400, tol=1e-12, **settings)
        return Equilibrium(config)(lambda s: s @ W.T + U, torch.zeros_like(U))

    closed, unrolled = torch.linalg.solve(torch.eye(6) - W, U.mT).mT, torch.zeros_like(U)
    for _ in range(400):
        unrolled = unrolled @ W.T + U
    implicit, exact = found(gradient="implicit"), gradients(closed, W, U)
    assert torch.allclose(implicit, closed, rtol=1e-8, atol=1e-8)
    for ours, theirs, plain in zip(gradients(implicit, W, U), exact, gradients(unrolled, W, U), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-7)
        assert torch.allclose(plain, theirs, rtol=1e-7, atol=1e-7)
    for phantom, theirs in zip(gradients(found(), W, U), exact, strict=True):
        assert not torch.allclose(phantom, theirs, rtol=0.1)


def test_the_phantom_gradient_is_that_of_damped_steps_from_the_fixed_point_and_nears_the_exact_one():
    W, U = contraction(radius=0.5)
    closed = torch.linalg.solve(torch.eye(6) - W, U.mT).mT
    exact, errors = gradients(closed, W, U), []
    for steps in (1, 4, 60):
        config = FixedPointConfig(max_steps=400, tol=1e-12, phantom_steps=steps, tau=0.7)
        ours = gradients(Equilibrium(config)(lambda s: s @ W.T + U, torch.zeros_like(U)), W, U)
        state = closed.detach()
        for _ in range(steps):
            state = 0.7 * (state @ W.T + U) + 0.3 * state
        for phantom, by_hand in zip(ours, gradients(state, W, U), strict=True):
            assert torch.allclose(phantom, by_hand, rtol=1e-8, atol=1e-8)
        errors.append((ours[0] - exact[0]).norm().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6 * exact[0].norm()


@pytest.mark.parametrize(("gradient", "phantom_steps"), [("phantom", 1), ("phantom", 3), ("implicit", 1)])
def test_a_fixed_point_has_gradient_in_its_last_steps_alone(gradient, phantom_steps, monkeypatch):
    rule = make("fixed-point", **{"fixed_point.max_steps": 5, "fixed_point.tol": 0.0, "fixed_point.gradient": gradient,
                                  "fixed_point.phantom_steps": phantom_steps})
    seen = watch_steps(rule, monkeypatch)
    rule(text(), draw())
    assert seen == [(False, False)] * 5 + [(True, step > 0) for step in range(phantom_steps)]


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
@pytest.mark.parametrize("gradient", ["phantom", "implicit"])
def test_a_fixed_point_reports_what_its_solvers_really_ran(solver, gradient, monkeypatch):
    rule = make("fixed-point", **{"fixed_point.max_steps": 7, "fixed_point.tol": 0.0, "fixed_point.solver": solver,
                                  "fixed_point.gradient": gradient})
    at_most = rule.layer_forwards()
    rule(text(), draw()).value.backward()
    rule.after_step()
    assert rule.layer_forwards() == at_most  # nothing settles within a tolerance of 0
    assert at_most == 7 + 3 * (1 + 1 + 1) + (1 + 7) * (gradient == "implicit")
    seen, rule.equilibrium.config = watch_steps(rule, monkeypatch), FixedPointConfig(
        max_steps=7, tol=100.0, solver=solver, gradient=gradient)
    for _ in range(2):  # two micro-batches
        loss = rule(text(), draw())
        loss.value.backward()
    rule.after_step()
    quick = int(loss.metrics["num_steps"])
    assert quick == seen.index((True, False)) < 7
    assert rule.layer_forwards() < at_most


def test_the_loss_of_a_fixed_point_is_read_where_one_more_step_changes_nothing():
    """A diagonal injection of tiny weights makes the core a contraction."""
    rule = make("fixed-point", **{"model.injection": "diagonal", "fixed_point.max_steps": 100, "fixed_point.tol": 1e-9})
    with torch.no_grad():
        for layer in rule.model.recurrence.core.blocks[0].layers:
            layer.attn.out.weight.mul_(0.1)
            layer.mlp.out.weight.mul_(0.1)
    loss = rule(text(), draw())
    e, state = first_state(rule)
    for _ in range(200):
        state = rule.model.step(state, e)
    assert loss.metrics["residual"] < 1e-9
    assert loss.value.item() == pytest.approx(read(rule, state).item(), rel=1e-6)


def test_andersons_method_takes_long_states_that_go_on_by_equal_steps():
    """In float32 TorchDEQ's own call ends in an error there: the positive control."""
    def on(s):
        return s + 500.0

    start = torch.zeros(2, 64, 64)
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        get_solver("anderson")(on, start, max_iter=24, tol=1e-6, stop_mode="rel")
    found = Equilibrium(FixedPointConfig(tol=1e-6))(on, start)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


def test_a_missing_torchdeq_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdeq.grad", None)
    with pytest.raises(UserError, match=r"pip install 'looped\[deq\]'") as error:
        make("fixed-point")
    assert "\n" not in str(error.value)


# ---- all of them


@pytest.mark.parametrize("gradient", ["phantom", "implicit"])
@pytest.mark.parametrize("name", RULES)
def test_every_parameter_has_a_gradient_in_every_step(name, gradient):
    """DistributedDataParallel waits for all of them."""
    rule = make(name, **RULES[name], **{"fixed_point.gradient": gradient})
    for step in range(5):
        rule.zero_grad(set_to_none=True)
        rule(text(), draw(step)).value.backward()
        assert [name for name, p in rule.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["progressive", "one-step"])
def test_micro_batches_are_taught_as_the_whole_batch(name):
    whole = make(name, **RULES[name])
    tokens = torch.cat([text(), text().flip(1), text()[:2]])
    loss = whole(tokens, draw(3, count=8)).value
    parts = [whole(tokens[start : start + 4], draw(3, start=start, count=4, total=8)).value for start in (0, 4)]
    assert loss.item() == pytest.approx(sum(parts).item() / 2, rel=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_a_few_dozen_steps_on_prefix_sums_lower_the_loss_and_answers_are_found(name):
    config = config_of(name, **RULES[name], **BITS)
    rule = make(name, **RULES[name], **BITS).float()
    optimizers, losses = build_optimizers(rule, config.optim), []
    for step in range(40):
        loss = rule(problems(config, 16, step), draw(step, count=16))
        loss.value.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        rule.after_step()
        losses.append(loss.metrics.get("cross_entropy", loss.value).item())
    assert sum(losses[-10:]) < 0.93 * sum(losses[:10])
    found = answer(rule.eval(), problems(config), (1, 4), config)
    assert found[4].answers.shape == (ROWS, 1 + 4)


def test_the_exit_by_a_learned_head_asks_the_head_of_one_step():
    config, rule = config_of("one-step", **BITS), make("one-step", **BITS).float().eval()
    assert isinstance(rule, OneStep)
    used = []
    for bias in (-9.0, 9.0):
        rule.halt.bias.data.fill_(bias)
        used.append(answer(rule, problems(config), (6,), config, exit=Exit.parse("head"))[6].used.tolist())
    assert used == [[6] * ROWS, [1] * ROWS]


@pytest.mark.parametrize(("flags", "why"), [
    ({"recurrence.progressive_weight": 1.5}, "recurrence.progressive_weight.*less than or equal to 1"),
    ({"objective": "one-step", "recurrence.loss_on": "every"}, "taken after each segment; set it to last"),
    ({"objective": "fixed-point", "recurrence.loss_on": "every"}, "taken at the fixed point; set it to last"),
    ({"supervision.segments": 0}, "supervision.segments.*greater than or equal to 1"),
    ({"fixed_point.max_steps": 2}, "max_steps 2 ends solver anderson before its first estimate; set it to 3 or more"),
    ({"fixed_point.solver": "newton"}, "fixed_point.solver.*'anderson'"),
    ({"fixed_point.tau": 0}, "fixed_point.tau.*greater than 0"),
    ({"fixed_point.tua": 1}, "did you mean 'tau'"),
])
def test_a_bad_setting_of_a_rule_is_named_in_one_sentence(flags, why):
    with pytest.raises(UserError, match=why) as error:
        load_config(None, flags)
    assert "\n" not in str(error.value)


def test_the_settings_of_the_rules_are_listed():
    names = {name for name, _, _ in describe_settings()}
    assert {"recurrence.progressive_weight", "supervision.segments", "fixed_point.solver"} <= names
