"""Forward-Forward: no gradient passes between layers, the loss by hand, wrong classes, and how a class is named."""

import pytest
import torch
from torch.nn.functional import logsigmoid, normalize

from looped.config import load_config
from looped.config.training import EvaluationConfig
from looped.data.image_batches import ImageSpec
from looped.data.images import ImageBatch
from looped.errors import UserError
from looped.inference.rollout import rollout_of
from looped.models.build import build
from looped.objectives import build_objective
from looped.objectives.base import rows_of_batch
from looped.objectives.local_rules.forward_forward import normalised
from looped.rng import StepRandom

CLASSES, ROWS, LAYERS = 5, 4, 3
PICTURE = ImageSpec(1, 4, 4, 2)
SMALL = {"objective": "forward-forward", "images.source": "digits", "model.width": 16, "model.num_heads": 2,
         "model.num_prelude_layers": 0, "model.num_core_layers": LAYERS, "model.num_coda_layers": 0,
         "model.patch_size": 2, "model.injection": "none"}


def make(**flags):
    config = load_config(None, SMALL | flags)
    return build_objective(config, build(config, CLASSES, PICTURE)).double().train()


def images(num=ROWS):
    gen = torch.Generator().manual_seed(0)
    pixels = torch.randn(num, 1, 4, 4, generator=gen, dtype=torch.float64)
    return PICTURE.ask(ImageBatch(pixels, torch.randint(CLASSES, (num,), generator=gen)))


def draw(step=0, num=ROWS):
    return StepRandom(0, step, count=num)


def goodness(rule, batch, labels=None):
    return rule.goodness(rule.encode(batch), batch.targets[:, 0] if labels is None else labels, batch)


def reached(rule, batch, layer):
    """The layers that have a gradient from the goodness of one of them."""
    rule.zero_grad()
    goodness(rule, batch)[layer].sum().backward()
    return [any(p.grad is not None and bool(p.grad.any()) for p in each.parameters()) for each in rule.layers]


# ---- gradients


def test_no_gradient_passes_between_layers_and_a_leak_is_seen(monkeypatch):
    rule, batch = make(), images()
    own = [[other == layer for other in range(LAYERS)] for layer in range(LAYERS)]
    assert [reached(rule, batch, layer) for layer in range(LAYERS)] == own
    monkeypatch.setattr(rule, "passed_on", normalised)  # positive control: the same without the cut
    assert reached(rule, batch, 2) == [True] * LAYERS


def test_all_that_is_trained_has_a_gradient():
    rule = make()
    rule(images(), draw()).value.backward()
    assert all(p.grad is not None for p in rule.parameters() if p.requires_grad)
    assert sum(p.numel() for p in rule.parameters() if not p.requires_grad) == 16  # the norm before a head


# ---- the loss


@pytest.mark.parametrize("rows_read", ["class", "all"])
@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_the_loss_is_the_log_likelihood_of_right_and_wrong(kind, rows_read):
    rule, batch = make(**{"forward_forward.goodness": kind, "forward_forward.threshold": 1.5,
                          "forward_forward.rows": rows_read}), images()
    labels = batch.targets[:, 0]
    wrong = rule.wrong(rule.encode(batch), labels, batch, draw())
    losses, scale = [], 16 if kind == "sum" else 1
    for shown, sign in ((labels, 1), (wrong, -1)):
        x = rule.encode(batch)
        x = torch.cat([x[:, :1] + 4 * rule.model.embed.weight[shown].unsqueeze(1), x[:, 1:]], dim=1)
        for layer in rule.layers:
            rows = rows_of_batch(batch)
            x = layer(normalize(x, dim=-1) * 4, None, rule.model.placed(x, rows))
            g = (x[:, :1] if rows_read == "class" else x).square().mean((1, 2)) * scale
            losses.append(-logsigmoid(sign * (g - 1.5 * scale)).mean())
    loss = rule(batch, draw())
    assert loss.value.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert set(loss.metrics) == {"loss", "right_layer0", "right_layer1", "right_layer2"}


def test_what_enters_a_layer_says_nothing_of_the_goodness_before_it():
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(normalised(x).square().mean(-1), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(normalised(7 * x), normalised(x))


@pytest.mark.parametrize("negatives", ["uniform", "hard"])
def test_a_wrong_class_is_never_the_right_one_and_every_other_comes(negatives):
    rule, batch = make(**{"forward_forward.negatives": negatives}), images(400)
    labels = batch.targets[:, 0]
    wrong = rule.wrong(rule.encode(batch), labels, batch, draw(num=400))
    assert (wrong != labels).all()
    assert ((wrong - labels) % CLASSES).unique().tolist() == [1, 2, 3, 4]


def test_hard_classes_are_drawn_as_often_as_they_are_mistaken(monkeypatch):
    rule, batch = make(**{"forward_forward.negatives": "hard"}), images(3000)
    monkeypatch.setattr(rule, "found", lambda e, batch, depth: torch.arange(CLASSES).double().expand(len(e), -1))
    zeros = torch.zeros(3000, dtype=torch.long)
    wrong = rule.wrong(rule.encode(batch), zeros, batch, draw(num=3000))
    shares = torch.arange(1.0, CLASSES).softmax(0)
    assert wrong.bincount(minlength=CLASSES)[1:].div(3000).tolist() == pytest.approx(shares.tolist(), abs=0.03)


# ---- naming


def test_a_class_is_named_by_the_layers_beyond_the_first():
    rule, batch = make().eval(), images()
    alone = torch.stack([goodness(rule, batch, torch.full((ROWS,), label)) for label in range(CLASSES)], dim=-1)
    for depth, layers in {1: alone[:1], 2: alone[1:2], 3: alone[1:], 9: alone[1:]}.items():
        torch.testing.assert_close(rule.class_logits(batch, depth, draw()), layers.sum(0))
    costs = [rollout_of(rule).answer_cost(depth, EvaluationConfig()).layer_forwards for depth in (1, 3, 9)]
    assert costs == [CLASSES, 3 * CLASSES, 3 * CLASSES]


def test_it_costs_two_passes_and_hard_classes_a_pass_each():
    assert make().layer_forwards() == 2 * 3 * LAYERS
    assert make(**{"forward_forward.negatives": "hard"}).layer_forwards() == (2 * 3 + CLASSES) * LAYERS


# ---- settings


@pytest.mark.parametrize(("flags", "why"), [
    ({"images.source": None}, "forward-forward classifies images"),
    ({"model.injection": "linear"}, "model.injection linear does not fit objective forward-forward.* set it to none"),
    ({"model.num_prelude_layers": 1}, "set it to 0"), ({"model.num_coda_layers": 1}, "set it to 0"),
    ({"model.block": "sandwich"}, "set it to prenorm"), ({"blocks.num": 3}, "only one block"),
    ({"forward_forward.threshold": 0}, "forward_forward.threshold")])
def test_what_does_not_fit_is_named_in_one_sentence(flags, why):
    with pytest.raises(UserError, match=why) as error:
        load_config(None, SMALL | flags)
    assert "\n" not in str(error.value)
