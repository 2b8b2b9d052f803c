"""States kept from the last visit to a sequence: what a visit goes on from, what it costs, and that a run resumes."""

import numpy as np
import pytest
import torch

from looped.config import load_config
from looped.config.unread_settings import not_read_under
from looped.cost.counts import count
from looped.data.token_windows import TokenStream
from looped.errors import UserError
from looped.models.build import build
from looped.objectives import build_objective
from looped.objectives.kept_states import KeptStates
from looped.rng import StepRandom
from looped.training import checkpoint as ckpt
from looped.training.logs import read_metrics
from looped.training.train import open_trainer, train

pytestmark = pytest.mark.usefixtures("unchecked")

LENGTH, BATCH, VOCAB = 8, 4, 270
KEEP = {"objective": "full", "recurrence.mean": 1, "revisit.keep": True, "revisit.restart_share": 0.0,
        "model.state_init": "zero"}


def stream(windows):
    tokens = np.random.default_rng(0).integers(VOCAB, size=windows * LENGTH + 1).astype(np.uint16)
    return TokenStream("train", tokens, end_of_text=0)


@pytest.fixture
def opened(tiny):
    """(rule, text) of a config with states to keep, for so many windows."""
    def make(windows=8, **flags):
        config = tiny(**KEEP | flags)
        rule, text = build_objective(config, build(config, VOCAB)).train(), stream(windows)
        rule.before_training(text)
        return rule, text

    return make


def visit(rule, text, step, rows=range(BATCH)):
    random = StepRandom(0, step, start=rows.start, count=len(rows), total=BATCH)
    return rule(text.batch(step, batch_size=BATCH, length=LENGTH, seed=0, rows=rows), random)


def run(rule, text, steps):
    for step in range(steps):
        visit(rule, text, step)
        rule.after_step()


@torch.no_grad()
def unrolled(rule, text, depth):
    """The states of all windows of a text after an unroll, as a loop would compute them."""
    tokens = text.gather(np.arange(text.windows(LENGTH)) * LENGTH, LENGTH)[:, :-1]
    return rule.model.unroll(rule.model.encode(tokens), grad=depth)


@pytest.mark.parametrize(("flags", "steps"), [
    ({}, 1), ({"recurrence.mean": 2}, 2),
    ({"objective": "truncated", "recurrence.mean": 3, "recurrence.distribution": "fixed"}, 3)], ids=str)
def test_after_k_epochs_a_state_is_that_of_k_visits_of_a_loop(opened, flags, steps):
    """With weights at rest; the shuffled order of each epoch tells windows from places."""
    rule, text = opened(**flags)
    for epochs in (1, 2, 3):
        run_of = range(2 * (epochs - 1), 2 * epochs)
        for step in run_of:
            visit(rule, text, step)
            rule.after_step()
        torch.testing.assert_close(rule.kept.states, unrolled(rule, text, epochs * steps), rtol=1e-4, atol=1e-5)
        assert rule.kept.visits.tolist() == [epochs] * 8
    assert not torch.allclose(rule.kept.states, unrolled(rule, text, 2 * steps), rtol=1e-3)


def test_the_loss_is_that_of_the_next_step_and_its_gradient_goes_through_that_step_alone(opened):
    rule, text = opened(4)
    run(rule, text, 2)
    batch = text.batch(2, batch_size=BATCH, length=LENGTH, seed=0)
    e = rule.model.encode(batch[:, :-1])
    state = rule.model.step(rule.model.unroll(e, grad=2).detach(), e)
    expected = torch.nn.functional.cross_entropy(rule.model.decode(state).flatten(0, 1), batch[:, 1:].flatten())
    found = visit(rule, text, 2)
    assert found.value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.metrics["visit"].item() == 3
    learns = [p for p in rule.parameters() if p.requires_grad]
    pairs = zip(torch.autograd.grad(found.value, learns), torch.autograd.grad(expected, learns), strict=True)
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-6) for one, other in pairs)


def test_a_sequence_begins_anew_after_the_largest_number_of_visits(opened):
    rule, text = opened(4, **{"revisit.max_visits": 2})
    run(rule, text, 3)
    assert rule.kept.visits.tolist() == [1] * 4
    torch.testing.assert_close(rule.kept.states, unrolled(rule, text, 1), rtol=1e-4, atol=1e-5)


def test_a_share_begins_anew_at_random_so_that_all_ages_are_in_a_batch(opened):
    rule, text = opened(64, **{"revisit.restart_share": 0.25})
    run(rule, text, 10 * 16)
    ages = torch.bincount(rule.kept.visits, minlength=9)
    assert ages[0] == 0
    assert (ages[1:5] > 0).all()
    assert 6 <= ages[1] <= 26  # 0.25 of 64, and a few of them at the end of their visits
    again, _ = opened(64, **{"revisit.restart_share": 0.25})
    run(again, text, 10 * 16)
    assert torch.equal(rule.kept.visits, again.kept.visits)


def test_a_step_reads_the_same_however_it_is_split_even_where_an_epoch_ends_in_it(opened):
    """Six windows in batches of four: every other batch holds the end of one epoch and the beginning of the next."""
    (whole, text), (parts, _) = opened(6), opened(6)
    met_twice = 0
    for step in range(12):
        windows = whole.kept.windows_of(StepRandom(0, step, count=BATCH)).tolist()
        met_twice += len(set(windows)) < BATCH
        visit(whole, text, step)
        for rows in (range(2), range(2, 4)):
            visit(parts, text, step, rows)
        for rule in (whole, parts):
            rule.after_step()
    assert met_twice > 0
    assert torch.equal(whole.kept.visits, parts.kept.visits)
    torch.testing.assert_close(whole.kept.states, parts.kept.states)


def test_evaluations_begin_anew_and_keep_nothing(opened):
    rule, text = opened(4)
    run(rule, text, 2)
    before = {name: tensor.clone() for name, tensor in rule.to_carry().items()}
    first, _ = opened(4)
    loss = visit(rule.eval(), text, 2).value.item()
    assert loss == pytest.approx(visit(first, text, 0).value.item(), rel=0.5)
    assert loss == visit(first.eval(), text, 2).value.item()
    rule.train().after_step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in rule.to_carry().items())


def test_a_visit_costs_what_a_single_pass_does(tiny):
    kept, ar = (count(tiny(**KEEP | flags), VOCAB) for flags in ({}, {"objective": "ar"}))
    assert (kept.step_flops, kept.layer_forwards) == (ar.step_flops, ar.layer_forwards)


def test_a_run_that_is_resumed_is_the_undisturbed_one(tiny, tmp_path):
    config = tiny(**KEEP | {"revisit.restart_share": 0.3, "revisit.dtype": "bfloat16", "data.max_bytes": 400,
                            "training.log_every": 1, "training.budget": 60, "training.checkpoint_every": 50})
    train(config, tmp_path / "whole", quiet=True)
    with open_trainer(config, tmp_path / "stopped", quiet=True) as trainer:
        for _ in range(33):
            trainer.step()
    train(config, tmp_path / "stopped", quiet=True)
    for part in ("model", "carried"):
        one, other = (ckpt.load_tensors(ckpt.checkpoint_path(tmp_path / run, 60), part) for run in ("whole", "stopped"))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert one["visits"].max() > 2  # of several epochs
    assert one["states"].dtype == torch.bfloat16
    lines = [line["visit"] for line in read_metrics(tmp_path / "whole") if line["kind"] == "train"]
    assert lines[0] == 1 < lines[-1]
    assert "revisit.keep: the states of" in (tmp_path / "whole" / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(("flags", "why"), [
    ({"task.name": "sudoku", "denoise.context": "inject"}, "those of task.name sudoku are drawn or changed anew"),
    ({"data.mixture": {"a": {"weight": 1}}}, "data.mixture has none; set revisit.keep to false, or give the text as"),
    ({"recurrence.from_share": 0.5}, "from_share 0.5 by the budget; set one of them to its default"),
    ({"recurrence.stages": [{"until": 0.5, "mean": 1}]}, "stages by the budget; set one of them to its default"),
    ({"model.streams": 2}, "model.streams is 2; set one of them to its default"),
    ({"training.shard": "fsdp"}, "training.shard is fsdp; set training.shard to none")], ids=str)
def test_what_is_not_met_again_is_refused_in_one_sentence(flags, why):
    with pytest.raises(UserError, match=why) as error:
        load_config(None, KEEP | flags)
    assert "\n" not in str(error.value)


def test_too_many_states_and_other_data_are_refused(tiny):
    config = tiny(**KEEP | {"revisit.max_gigabytes": 1e-6})
    kept = KeptStates(config.revisit, LENGTH, 16)
    with pytest.raises(UserError, match=r"5.12e-06 GB for the states of 10 sequences, more than revisit.max_gigabytes"):
        kept.prepare(stream(10))
    said = kept.prepare(stream(1))
    assert said == "revisit.keep: the states of 1 training sequences, 5.12e-07 GB, in memory and in checkpoints"
    with pytest.raises(UserError, match="fixed windows, and object has none"):
        kept.prepare(object())


def test_its_settings_are_read_by_these_rules_alone():
    config = load_config(None, KEEP)
    for objective in ("full", "truncated", "progressive", "ar", "denoise"):
        read = not not_read_under(config.replace(objective=objective), "revisit.max_visits")
        assert read == (objective in ("full", "truncated")), objective
    off = config.replace(**{"revisit.keep": False})
    assert not_read_under(off, "revisit.restart_share") == "revisit.keep False"
    assert not not_read_under(off, "revisit.keep")


def test_one_process_keeps_the_states(tiny):
    for flags, said in (({}, ""), (KEEP, "revisit.keep keeps the states of all sequences in one process")):
        config = tiny(**flags)
        assert build_objective(config, build(config, 270)).one_process == said
