"""NoProp: its losses by hand, where its gradients flow, its solvers on perfect predictors, what it costs."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from looped.config import load_config
from looped.config.training import EvaluationConfig
from looped.data.batch import Batch
from looped.data.image_batches import ImageSpec
from looped.data.images import ImageBatch
from looped.errors import UserError
from looped.inference.rollout import rollout_of
from looped.models.build import build
from looped.objectives import build_objective
from looped.objectives.base import rows_of_batch
from looped.objectives.local_rules.vp_noise import posterior, prior_divergence
from looped.rng import StepRandom

CLASSES, ROWS = 6, 4
PICTURE = ImageSpec(1, 4, 4, 2)
SMALL = {"images.source": "digits", "model.width": 16, "model.num_heads": 2, "model.num_prelude_layers": 1,
         "model.num_core_layers": 3, "model.patch_size": 2, "denoise.cond_width": 8, "noprop.dim": 8}
BLOCKS = {"noprop-dt": {"blocks.num": 3}, "noprop-ct": {}, "noprop-fm": {}}


def make(rule, **flags):
    config = load_config(None, SMALL | BLOCKS[rule] | {"objective": rule} | flags)
    return build_objective(config, build(config, CLASSES, PICTURE)).double().train()


def images(num=ROWS) -> Batch:
    gen = torch.Generator().manual_seed(0)
    pixels = torch.randn(num, 1, 4, 4, generator=gen, dtype=torch.float64)
    return PICTURE.ask(ImageBatch(pixels, torch.randint(CLASSES, (num,), generator=gen)))


def draw(step=0):
    return StepRandom(0, step, count=ROWS)


def encoded(rule, batch):
    rows = rows_of_batch(batch)
    return rule.model.encode(batch.inputs, rows), rows


def answer_with(rule, monkeypatch, u):
    """The network always sees these clean embeddings."""
    monkeypatch.setattr(rule, "estimate", lambda z, e, rows, **step: u)


# ---- losses


@pytest.mark.parametrize("embedding", ["learned", "one-hot"])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_the_loss_of_a_block_is_the_papers_equation_8(block, embedding):
    rule, batch = make("noprop-dt", **{"noprop.embedding": embedding, "noprop.eta": 0.7}), images()
    (e, rows), labels, random = encoded(rule, batch), batch.targets[:, 0], draw()
    u, log_snr = rule.table[labels], rule.log_snr()
    alpha = log_snr.sigmoid()
    z = alpha[block].sqrt() * u + (1 - alpha[block]).sqrt() * random.normal("noise", (rule.dim,))
    last = alpha[-1].sqrt() * u + (1 - alpha[-1]).sqrt() * random.normal("noise at the end", (rule.dim,))
    state = torch.cat([(z @ rule.in_proj.weight.T).unsqueeze(1), torch.zeros_like(e[:, 1:])], dim=1)
    logits = rule.model.decode(rule.model.step(state, e, None, rows.having(block=block)), rows)[:, 0]
    error = (logits.float().softmax(-1).double() @ rule.table - u).square().sum(-1).mean()
    weight = alpha[block + 1] / (1 - alpha[block + 1]) - alpha[block] / (1 - alpha[block])
    named, terms = rule.terms_of(block, u, e, rows, draw())
    torch.testing.assert_close(named, rule.classifier(last), rtol=1e-6, atol=1e-8)
    assert terms["denoising"].item() == pytest.approx((3 / 2 * 0.7 * weight * error).item(), rel=1e-5)
    assert terms["prior"].item() == pytest.approx(prior_divergence(u, log_snr[0]).mean().item(), rel=1e-9)
    assert cross_entropy(named, labels).isfinite()


def test_the_loss_is_the_sum_of_its_terms_and_the_cross_entropy():
    for name in BLOCKS:
        loss = make(name)(images(), draw())
        parts = {"cross_entropy", "flow"} if name == "noprop-fm" else {"cross_entropy", "prior", "denoising"}
        assert loss.value.item() == pytest.approx(sum(loss.metrics[part].item() for part in parts), rel=1e-9)
        assert loss.metrics["loss"].item() == loss.value.item()


def test_the_blocks_terms_add_up_to_the_bound_of_many_small_steps(monkeypatch):
    """The mean over blocks of T / 2 (SNR(t) - SNR(t-1)) times a constant error is the integral of SNR' / 2 times it,
    the bound of continuous time."""
    rule, u = make("noprop-dt", **{"noprop.eta": 1.0}), torch.zeros(ROWS, 8, dtype=torch.float64)
    answer_with(rule, monkeypatch, u + 0.5)
    batch = images()
    e, rows = encoded(rule, batch)
    mean = sum(rule.terms_of(block, u, e, rows, draw())[1]["denoising"].item() for block in range(3)) / 3
    times = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    assert mean == pytest.approx(rule.schedule.snr_slope(times).mean().item() / 2 * 8 * 0.25, rel=1e-4)


def test_in_continuous_time_the_weight_is_the_slope_of_snr(monkeypatch):
    rule, batch = make("noprop-ct", **{"noprop.schedule": "cosine"}), images()
    u = rule.table[batch.targets[:, 0]]
    answer_with(rule, monkeypatch, u + 0.5)
    _, terms = rule.terms(u, *encoded(rule, batch), draw())
    t = draw().stratified("time").requires_grad_()
    slope, = torch.autograd.grad(rule.schedule.log_snr(t).exp().sum(), t)
    assert terms["denoising"].item() == pytest.approx((slope / 2 * 8 * 0.25).mean().item(), rel=1e-9)


def test_a_velocity_that_is_right_leaves_the_cross_entropy_of_the_clean_embedding_alone(monkeypatch):
    rule, batch = make("noprop-fm"), images()
    u, start = rule.table[batch.targets[:, 0]], draw().normal("noise", (8,)).double()
    monkeypatch.setattr(rule, "velocity", lambda z, e, rows, t: u - start)
    named, terms = rule.terms(u, *encoded(rule, batch), draw())
    assert terms["flow"].item() == pytest.approx(0, abs=1e-20)
    torch.testing.assert_close(named, rule.classifier(u), rtol=1e-9, atol=1e-12)


# ---- gradients


@pytest.mark.parametrize("embedding", ["learned", "one-hot"])
@pytest.mark.parametrize("name", BLOCKS)
def test_all_that_is_trained_has_a_gradient_and_one_block_alone(name, embedding):
    rule = make(name, **{"noprop.embedding": embedding})
    rule(images(), draw()).value.backward()
    blocks = rule.model.recurrence.core.blocks
    taught = [all(p.grad is not None for p in block.parameters()) for block in blocks]
    assert sum(taught) == 1
    assert all(p.grad is None for block, at_work in zip(blocks, taught, strict=True) if not at_work
               for p in block.parameters())
    resting = {id(p) for block in blocks for p in block.parameters()}
    assert all(p.grad is not None for p in rule.parameters() if p.requires_grad and id(p) not in resting)
    assert rule.table.requires_grad == (embedding == "learned")


def test_every_block_comes_as_often_and_all_processes_train_the_same():
    rule = make("noprop-dt")
    drawn = [int(torch.randint(3, (), generator=draw(step).lockstep("block"))) for step in range(600)]
    assert [drawn.count(block) for block in range(3)] == pytest.approx([200] * 3, abs=45)
    rule(images(), draw(1)).value.backward()
    assert next(rule.model.recurrence.core.blocks[drawn[1]].parameters()).grad is not None


# ---- solvers


def last_z(rule, batch, depth):
    """z where the solver ends."""
    seen = []
    handle = rule.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    rule.class_logits(batch, depth, draw())
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("name", "flags", "depth"), [
    ("noprop-dt", {}, 3), ("noprop-ct", {"noprop.solver": "posterior"}, 1),
    ("noprop-ct", {"noprop.solver": "posterior"}, 7), ("noprop-ct", {}, 60)])
def test_a_perfect_predictor_drives_z_to_the_embedding(name, flags, depth, monkeypatch):
    rule, batch = make(name, **flags, **{"noprop.log_snr": [-9.0, 14.0]}), images()
    u = rule.table[batch.targets[:, 0]].detach()
    answer_with(rule, monkeypatch, u)
    assert (last_z(rule, batch, depth) - u).norm(dim=-1).max() < 0.1
    answer_with(rule, monkeypatch, u.roll(1, 0))  # positive control: it goes where the network says
    assert (last_z(rule, batch, depth) - u).norm(dim=-1).max() > 1


def test_steps_of_discrete_time_are_the_papers_equation_3(monkeypatch):
    rule, batch, random = make("noprop-dt"), images(), draw()
    u, (a, b, c) = rule.table[batch.targets[:, 0]].detach(), posterior(*rule._pairs())
    answer_with(rule, monkeypatch, u)
    z = random.normal("start", (8,)).double()
    for t in range(2):
        z = a[t] * u + b[t] * z + c[t].sqrt() * random.normal(f"step{t}", (8,))
    torch.testing.assert_close(last_z(rule, batch, 2), z, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("depth", [1, 5])
def test_eulers_steps_along_the_exact_field_reach_the_embedding(depth, monkeypatch):
    """(u - z) / (1 - t) is the field of straight lines to u, whatever z they come from."""
    rule, batch = make("noprop-fm"), images()
    u = rule.table[batch.targets[:, 0]].detach()
    monkeypatch.setattr(rule, "velocity", lambda z, e, rows, t: (u - z) / (1 - t.unsqueeze(-1)))
    torch.testing.assert_close(last_z(rule, batch, depth).double(), u, rtol=1e-6, atol=1e-6)


def test_there_are_no_more_steps_than_blocks():
    rule, batch = make("noprop-dt").eval(), images()
    logits = {depth: rule.class_logits(batch, depth, draw()) for depth in (2, 3, 9)}
    assert torch.equal(logits[3], logits[9])
    assert not torch.equal(logits[2], logits[3])
    costs = [rollout_of(rule).answer_cost(depth, EvaluationConfig()).layer_forwards for depth in (1, 3, 9)]
    assert costs == [1 + 2, 1 + 6, 1 + 6]


# ---- costs and settings


def test_a_training_step_costs_one_block_or_the_whole_core():
    assert make("noprop-dt").layer_forwards() == 3 * (1 + 1 + 1)
    assert make("noprop-ct").layer_forwards() == make("noprop-fm").layer_forwards() == 3 * (1 + 3 + 1)


@pytest.mark.parametrize(("flags", "why"), [
    ({"objective": "noprop-ct", "images.source": None}, "classifies images; set images.source to digits"),
    ({"objective": "noprop-dt"}, "blocks.num is 1; set blocks.num to 2 or more, or objective to noprop-ct"),
    ({"objective": "noprop-fm", "blocks.num": 3}, "noprop-fm supports only one block"),
    ({"objective": "noprop-dt", "blocks.num": 3, "noprop.schedule": "learned"}, "is for continuous time"),
    ({"objective": "noprop-dt", "blocks.num": 3, "blocks.shared": "frozen"}, "set it to trained"),
    ({"noprop.log_snr": [2.0, -2.0]}, r"set noprop.log_snr to \[-2.0, 2.0\]"),
    ({"noprop.eta": 0}, "noprop.eta"), ({"noprop.embeding": "learned"}, "did you mean 'embedding'")])
def test_what_does_not_fit_is_named_in_one_sentence(flags, why):
    with pytest.raises(UserError, match=why) as error:
        load_config(None, SMALL | flags)
    assert "\n" not in str(error.value)
