"""Draws made ahead of their step are those that the step would make, and the thread that makes them ends."""

import threading

import pytest
import torch

from looped.rng import StepRandom
from looped.training import trainer as trainers
from looped.training.draw_ahead import DrawAhead, DrawPlan, StepDraws
from looped.training.logs import read_metrics
from looped.training.train import open_trainer, train

pytestmark = pytest.mark.usefixtures("unchecked")

RULES = {
    "truncated": {"objective": "truncated"}, "one depth per batch": {"objective": "truncated",
                                                                     "recurrence.per_sequence": False},
    "denoise, two kinds of step": {"objective": "denoise", "denoise.carry": "latent"},
    "blockwise, two micro-batches": {"objective": "blockwise", "blocks.num": 3, "model.num_core_layers": 3,
                                     "training.accumulation": 2},
    "masked": {"objective": "masked", "model.state_init": "zero"},
    "drawn on the device": {"objective": "denoise", "training.rng": "device"},
}


class Threaded(DrawAhead):
    """As on a device."""

    def __init__(self, *args, threaded):
        super().__init__(*args, threaded=True)
        self.given = []

    def get(self, step, micro):
        batch, draws = super().get(step, micro)
        self.given.append(draws)
        return batch, draws


@pytest.mark.parametrize("rule", RULES)
def test_a_thread_changes_no_weight_and_no_figure(tiny, tmp_path, monkeypatch, rule):
    config = tiny(**RULES[rule])
    plain = train(config, tmp_path / "plain", quiet=True).objective
    monkeypatch.setattr(trainers, "DrawAhead", Threaded)
    with open_trainer(config, tmp_path / "ahead", quiet=True) as trainer:
        while not trainer.finished:
            trainer.step()
    for ours, theirs in zip(trainer.objective.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("plain", "ahead")]
    assert losses[0] == losses[1]
    last = trainer.ahead.given[-1]
    assert last.made
    assert set(last.asked) <= set(last.made)  # nothing was left to draw in the last step


@pytest.mark.parametrize("compile", [False, "step"])
def test_a_step_of_new_depths_is_no_new_kind_and_runs_compiled_if_it_should(tiny, tmp_path, monkeypatch, compile):
    """Only a graph of the whole rule waits for its draws to be listed."""
    stances = []
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)
    monkeypatch.setattr("looped.models.language.LanguageModel.compile_step", lambda model: None)
    with open_trainer(tiny(objective="truncated", **{"training.compile": compile}), tmp_path / "run",
                      quiet=True) as trainer:
        while not trainer.finished:
            trainer.step()
    assert len(trainer.ahead.plan.asked) == 1
    assert stances == []


def test_normal_draws_of_the_device_take_no_time_of_the_host(tiny, tmp_path, monkeypatch):
    """No generator of the host draws a normal number, of a rule that asks for some; the losses are others."""
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: drawn.append(args) or randn(*args, **kwargs))
    losses = {}
    for rng in ("device", "host"):
        with open_trainer(tiny(objective="ar", **{"training.rng": rng}), tmp_path / rng, quiet=True) as trainer:
            drawn.clear()
            for _ in range(3):
                trainer.step()
            losses[rng] = len(drawn), trainer.figures["loss"]
    assert losses["device"][0] == 0 < losses["host"][0]
    assert losses["device"][1] != losses["host"][1]


def test_the_thread_ends_with_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(trainers, "DrawAhead", Threaded)
    train(tiny(), tmp_path / "run", quiet=True)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("draw-ahead")]


def test_on_the_host_nothing_is_drawn_by_a_thread(tiny, tmp_path):
    with open_trainer(tiny(), tmp_path / "run", quiet=True) as trainer:
        trainer.step()
        assert trainer.ahead.thread is None


def rule(random):
    """A rule that draws more in half of its steps."""
    values = [random.normal("a", (3,)), random.uniform("b", (2,)), random.stratified("c")]
    if random.decide("more", lambda step: bool(torch.randint(2, (), generator=step.lockstep("more")))):
        values.append(random.normal("d", (1,)))
    return values


def test_what_a_kind_of_step_draws_is_known_once_one_was_run():
    plan, complete = DrawPlan(), []
    for step in range(12):
        given = StepRandom(5, step, count=4, start=2, total=8)
        draws = plan.make(given)
        complete.append(draws.complete)
        for ours, theirs in zip(rule(draws), rule(given), strict=True):
            assert torch.equal(ours, theirs)
        assert not (draws.complete and draws.asked)
        plan.learn(draws)
    kinds = [len(rule(StepRandom(5, step, count=4, start=2, total=8))) for step in range(12)]
    assert set(kinds) == {3, 4}
    assert complete == [kinds[step] in kinds[:step] for step in range(12)]


def test_an_error_in_the_data_reaches_the_step_that_needs_them():
    def prepare(step, micro):
        if step == 1:
            raise OSError("gone")
        return torch.zeros(1), StepRandom(0, step, count=1)

    ahead = DrawAhead(prepare, 1, threaded=True)
    assert isinstance(ahead.get(0, 0)[1], StepDraws)
    with pytest.raises(OSError, match="gone"):
        ahead.get(1, 0)
    ahead.close()
