"""Earlier readouts taught by the last one: the loss by hand, what it costs and keeps, and where it does not fit."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from looped.config import load_config
from looped.config.unread_settings import not_read_under
from looped.cost.counts import count
from looped.data.batch import Batch
from looped.errors import UserError
from looped.models.build import build
from looped.nn import distillation
from looped.nn.distillation import linear_divergence
from looped.objectives import build_objective
from looped.rng import StepRandom

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

VOCAB = 30
SMALL = {"objective": "full", "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "recurrence.mean": 4,
         "recurrence.loss_on": "distil", "recurrence.distil_weight": 0.7, "recurrence.distil_temperature": 2.0}
TRUNCATED = {"objective": "truncated", "recurrence.distribution": "fixed", "recurrence.backprop": 2}


def make(**flags):
    return build_objective(load_config(None, SMALL | flags), build(load_config(None, SMALL | flags), VOCAB)).double()


def text():
    return torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))


def draw():
    return StepRandom(0, 0, count=3)


def by_hand(rule, *, no_grad=0, weight=0.7, temperature=2.0, taught_back=False):
    """Cross-entropy after four steps, and torch's KL of the readouts before, of steps with gradient, from the last."""
    model = rule.model
    e = model.encode(text()[:, :-1])
    state = model.initial_state(e, draw().normal("state", e.shape[1:]))
    logits = []
    for step in range(4):
        with torch.set_grad_enabled(step >= no_grad):
            state = model.step(state, e)
        logits.append(model.decode(state).flatten(0, 1))
    taught = logits[-1] if taught_back else logits[-1].detach()
    apart = [kl_div((student / temperature).log_softmax(-1), (taught / temperature).softmax(-1), reduction="batchmean")
             for student in logits[no_grad:-1]]
    value = cross_entropy(logits[-1], text()[:, 1:].flatten())
    return value + weight * temperature**2 * torch.stack(apart).mean()


@pytest.mark.parametrize(("flags", "no_grad"), [({}, 0), (TRUNCATED, 2)], ids=["full", "truncated"])
def test_the_loss_is_the_last_ones_and_what_the_earlier_ones_differ_from_it(flags, no_grad):
    rule = make(**flags)
    value, expected = rule(text(), draw()).value, by_hand(rule, no_grad=no_grad)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    learns = [p for p in rule.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(loss, learns) for loss in (value, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)
    both = torch.autograd.grad(by_hand(rule, no_grad=no_grad, taught_back=True), learns)
    assert not all(torch.allclose(one, other, rtol=1e-3) for one, other in zip(ours, both, strict=True))
    assert rule.layer_forwards() == no_grad + 3 * (1 + (4 - no_grad) + (4 - no_grad))  # a readout after every step


def test_rows_that_are_not_scored_do_not_count():
    """The loss of the first five rows alone, under a causal mask, is that of the shorter text."""
    rule, batch = make(), Batch.of(text())
    scored = torch.arange(8).expand(3, 8) < 5
    part = Batch(batch.inputs, batch.targets, scored=scored)
    short = Batch.of(text()[:, :6])
    rule.model.recurrence.state_init = "zero"
    assert rule(part, draw()).value.item() == pytest.approx(rule(short, draw()).value.item(), rel=1e-9)
    assert rule(batch, draw()).value.item() != pytest.approx(rule(short, draw()).value.item(), rel=1e-3)


def test_a_head_that_is_called_gives_what_a_plain_one_gives():
    rule = make(**{"model.tie_embeddings": False})
    plain = rule(text(), draw()).value
    rule.model.head = nn.Sequential(rule.model.head)
    assert rule(text(), draw()).value.item() == pytest.approx(plain.item(), rel=1e-6)


def inputs():
    gen = torch.Generator().manual_seed(1)
    students, teacher, weight = (torch.randn(shape, generator=gen, dtype=torch.float64).requires_grad_()
                                 for shape in ((2, 3, 4, 5), (3, 4, 5), (7, 5)))
    return students, teacher, weight


def test_the_divergence_passes_gradcheck_in_parts(monkeypatch):
    monkeypatch.setattr(distillation, "row_parts", lambda rows, vocab: [slice(0, 5), slice(5, 12)])
    students, teacher, weight = inputs()
    fixed = weight.detach()
    assert torch.autograd.gradcheck(lambda s: linear_divergence(s, teacher, fixed, temperature=1.5), (students,))
    ours = torch.autograd.grad(linear_divergence(students, teacher, weight, temperature=1.5).sum(), weight)[0]
    p = (teacher.detach() @ weight.detach().T / 1.5).softmax(-1)
    log_q = (students.detach() @ weight.T / 1.5).log_softmax(-1)
    plain = 1.5**2 * (p * (p.log() - log_q)).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(plain, weight)[0])


def test_transposed_students_have_the_gradient_of_contiguous_ones():
    students, teacher, weight = inputs()
    turned = students.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert not turned.is_contiguous()
    ours, plain = (torch.autograd.grad(linear_divergence(s, teacher, weight, temperature=1.5).sum(), s)[0]
                   for s in (turned, students))
    torch.testing.assert_close(ours, plain)


def test_no_logits_are_kept():
    students, teacher, weight = inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        linear_divergence(students, teacher, weight, temperature=1.0)
    assert kept
    assert all(7 not in shape[1:] for shape in kept)


def test_readouts_cost_products_with_the_head():
    """Forward: 4 rows of the head's product more than the last readout, 3 of students and the teacher's own; backward:
    two per student."""
    config = load_config(None, SMALL | {"data.length": 8, "evaluation.prompt_length": 4, "training.batch_size": 2,
                                        "training.precision": "fp32", "model.num_coda_layers": 0})
    product = 2 * 2 * 8 * 16 * VOCAB
    plain = count(config.replace(**{"recurrence.loss_on": "last"}), VOCAB)
    assert count(config, VOCAB).step_flops - plain.step_flops == (4 + 2 * 3) * product


def test_before_a_late_loop_begins_there_is_nobody_to_teach():
    late, ar = make(**{"recurrence.from_share": 0.5}).train(), make(objective="ar").train()
    ar.load_state_dict(late.state_dict())
    late.before_step(0.0)
    assert late(text(), draw()).value.item() == ar(text(), draw()).value.item()
    late.before_step(0.6)
    assert late(text(), draw()).value.item() == pytest.approx(by_hand(late).item(), rel=1e-9)


@pytest.mark.parametrize(("flags", "why"), [
    ({"recurrence.mean": 1}, "recurrence.mean 1 leaves none with gradient; set it to 2 or more"),
    (TRUNCATED | {"recurrence.backprop": 1}, "recurrence.backprop 1 leaves none with gradient; set it to 2 or more"),
    ({"objective": "truncated"}, "loss_on distil needs one depth for the whole batch; set recurrence.per_sequence"),
    ({"objective": "one-step"}, "distil does not fit one-step, whose loss is taken after each segment; set it to last"),
    ({"recurrence.distil_temperature": 0}, "distil_temperature")])
def test_where_nobody_can_be_taught_is_one_sentence(flags, why):
    with pytest.raises(UserError, match=why) as error:
        load_config(None, SMALL | flags)
    assert "\n" not in str(error.value)


def test_its_settings_are_read_with_it_alone():
    config = load_config(None, SMALL)
    for name in ("recurrence.distil_weight", "recurrence.distil_temperature"):
        assert not not_read_under(config, name)
        assert not_read_under(config.replace(**{"recurrence.loss_on": "every"}), name) == "recurrence.loss_on every"
        assert not_read_under(config.replace(objective="ar"), name) == "objective ar"
