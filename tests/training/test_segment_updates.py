"""An update after every segment (HRM, TRM): what is carried to the next step, by hand, and kept by a checkpoint."""

from types import SimpleNamespace

import pytest
import torch

from looped.config import load_config
from looped.config.unread_settings import not_read_under
from looped.data.task_data import prepare_task
from looped.errors import UserError
from looped.models.build import build
from looped.objectives import build_objective
from looped.objectives.base import rows_of_batch
from looped.objectives.one_step import SegmentUpdates
from looped.rng import StepRandom
from looped.training import checkpoint as ckpt
from looped.training.logs import read_metrics
from looped.training.step_checks import check_rule
from looped.training.train import open_trainer, train

pytestmark = pytest.mark.usefixtures("unchecked")

NUM = 6
SETTINGS = {
    "objective": "one-step", "task.name": "prefix-sums", "task.difficulty": [4, 4], "model.width": 8,
    "model.num_heads": 2, "model.num_core_layers": 1, "model.num_prelude_layers": 0, "model.num_coda_layers": 0,
    "model.latent_updates": 2, "supervision.segments": 3, "supervision.steps": 1, "supervision.update": "segment",
    "optim.ema_decay": 0.9, "training.batch_size": NUM, "training.budget": 8, "training.budget_unit": "steps",
    "training.log_every": 1, "training.checkpoint_every": 4, "training.keep_checkpoints": 9, "training.num_evals": 1,
    "evaluation.depths": [1, 2], "evaluation.num_problems": 8}


def config_of(**flags):
    return load_config(None, SETTINGS | flags)


def make(config):
    data = prepare_task(config.task)
    return data, build_objective(config, build(config, data.vocab_size)).double().train()


def parts(run, step, part):
    return ckpt.load_tensors(ckpt.checkpoint_path(run, step), part)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class ByHand:
    """The rows of a batch one by one, each with its sequence, state and age, under the weights of the rule."""

    def __init__(self, rule, settings):
        self.rule, self.settings, self.rows = rule, settings, [None] * NUM

    @torch.no_grad()
    def step(self, given, random):
        """Mean cross-entropy of the segment, and the ages of the sequences that leave."""
        model, losses, left = self.rule.model, [], []
        noise = random.normal("state", (given.num_rows, 8)).double()
        draws = random.uniform("explore", (2,))
        for row, kept in enumerate(self.rows):
            batch, state, age = kept or (given[row : row + 1], None, 0)
            around = rows_of_batch(batch)
            e = model.encode(batch.inputs, around)
            state = model.initial_state(e, noise[row : row + 1]) if state is None else state
            for _ in range(2):
                state = model.step(state, e, None, around)
            losses.append(self.rule.read_out(state, batch, around).item())
            age += 1
            stays = draws[row, 0] < self.settings.explore
            least = 2 + int(draws[row, 1] * (self.settings.segments - 1)) if stays else 0
            leaves = age == self.settings.segments or (self.rule.halt_logit(state, batch).item() > 0 and age >= least)
            left += [age] * leaves
            self.rows[row] = None if leaves else (batch, state, age)
        return sum(losses) / NUM, left


@pytest.mark.parametrize("explore", [0.0, 0.7])
def test_each_row_goes_on_from_its_state_until_its_sequence_leaves(explore):
    config = config_of(**{"supervision.explore": explore})
    data, rule = make(config)
    torch.nn.init.normal_(rule.halt.weight, std=5.0, generator=torch.Generator().manual_seed(1))
    hand, optimizer, ages = ByHand(rule, config.supervision), torch.optim.SGD(rule.parameters(), lr=0.3), set()
    for step in range(12):
        given, random = data.train.batch(step, batch_size=NUM, seed=0), StepRandom(0, step, count=NUM)
        expected, left = hand.step(given, random)
        loss = rule(given, random)
        assert loss.metrics["cross_entropy"].item() == pytest.approx(expected, rel=1e-6)
        assert loss.metrics["leaving"].item() == pytest.approx(len(left) / NUM)
        assert loss.shares["segments_used"].tolist() == [sum(left), len(left)]
        loss.value.backward()
        optimizer.step()
        optimizer.zero_grad()
        rule.after_step()
        ages |= set(left)
    assert ages >= {1, 3}


def test_a_step_that_is_never_finished_carries_nothing_on():
    data, rule = make(config_of())
    given, random = data.train.batch(0, batch_size=NUM, seed=0), StepRandom(0, 0, count=NUM)
    values = [rule(given, random).value.item() for _ in range(2)]
    assert values[0] == values[1]
    assert rule.to_carry() == {}
    rule.after_step()
    assert rule(given, random).value.item() != values[0]
    assert len(rule.to_carry()["state"]) == NUM


def test_the_loss_of_held_out_data_is_that_of_all_segments_and_touches_nothing():
    data, rule = make(config_of())
    _, together = make(config_of(**{"supervision.update": "batch"}))
    given, random = data.train.batch(0, batch_size=NUM, seed=0), StepRandom(0, 0, count=NUM)
    rule(given, random)
    rule.after_step()
    before = dict(rule.to_carry())
    assert rule.eval()(given, random).value.item() == together(given, random).value.item()
    rule.after_step()
    assert same(before, rule.to_carry())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_that_is_resumed_is_the_undisturbed_one(accumulation, tmp_path):
    config = config_of(**{"training.accumulation": accumulation})
    train(config, tmp_path / "whole", quiet=True)
    with open_trainer(config, tmp_path / "cut", quiet=True) as trainer:
        for _ in range(5):
            trainer.step()
    train(config, tmp_path / "cut", quiet=True)
    for part in ("model", "ema", "optimizer", "carried"):
        assert same(parts(tmp_path / "whole", 8, part), parts(tmp_path / "cut", 8, part)), part
    assert set(parts(tmp_path / "cut", 8, "carried")["age"].tolist()) <= {1, 2, 3}


def test_without_what_a_checkpoint_carries_it_would_be_another_run(tmp_path, monkeypatch):
    config = config_of()
    train(config, tmp_path / "whole", quiet=True)
    with open_trainer(config, tmp_path / "cut", quiet=True) as trainer:
        for _ in range(5):
            trainer.step()
    monkeypatch.setattr(SegmentUpdates, "carry_on", lambda self, tensors: None)
    train(config, tmp_path / "cut", quiet=True)
    assert not same(parts(tmp_path / "whole", 8, "model"), parts(tmp_path / "cut", 8, "model"))


def test_micro_batches_carry_what_the_whole_batch_does():
    data, whole = make(config_of())
    _, cut = make(config_of())
    for step in range(5):
        given = data.train.batch(step, batch_size=NUM, seed=0)
        whole(given, StepRandom(0, step, count=NUM))
        for first in (0, 2, 4):
            cut(given[first : first + 2], StepRandom(0, step, start=first, count=2, total=NUM))
        whole.after_step(), cut.after_step()
    one, other = whole.to_carry(), cut.to_carry()
    assert torch.allclose(one.pop("state"), other.pop("state"), atol=1e-9)
    assert same(one, other)


def test_a_step_costs_one_segment(tmp_path):
    config = config_of()
    _, rule = make(config)
    assert rule.layer_forwards() == 3 + 3 * 3  # a step without gradient and one with it, of three runs each
    train(config, tmp_path / "run", quiet=True)
    lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert lines[-1]["layer_forwards"] == 8 * NUM * 12
    assert all(0 <= line["leaving"] <= 1 for line in lines)
    assert config.main_depth == 6
    assert config.rule.passes(config) == 2


def test_sequences_of_several_lengths_are_refused():
    data, rule = make(config_of(**{"task.difficulty": [2, 9]}))
    batches = [data.train.batch(step, batch_size=2, seed=0) for step in range(9)]
    first, other = batches[0], next(batch for batch in batches if batch.num_rows != batches[0].num_rows)
    rule(first, StepRandom(0, 0, count=2))
    rule.after_step()
    with pytest.raises(UserError, match=r"supervision.update segment keeps sequences .* train on one difficulty"):
        rule(other, StepRandom(0, 1, count=2))


def test_several_processes_are_refused():
    _, rule = make(config_of())
    trainer = SimpleNamespace(objective=rule, accelerator=SimpleNamespace(num_processes=2))
    with pytest.raises(UserError, match=r"supervision.update segment carries the states of all sequences in one "
                                        r"process, and there are 2; start one"):
        check_rule(trainer)


def test_exploration_is_read_with_it_alone():
    assert not not_read_under(config_of(), "supervision.explore")
    assert not_read_under(config_of(**{"supervision.update": "batch"}), "supervision.explore") == \
        "supervision.update batch"
