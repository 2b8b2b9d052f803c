"""A trainer to hold: steps one by one, callbacks that are told and may end training, trackers, quiet."""

import json

import pytest

from looped.config import load_config
from looped.errors import UserError
from looped.training.callbacks import Callback, EarlyStopping, Trackers
from looped.training.logs import read_metrics
from looped.training.train import open_trainer, train

pytestmark = pytest.mark.usefixtures("unchecked")

TINY = {"model.width": 16, "model.num_heads": 2, "data.length": 32, "data.vocab_size": 270, "training.batch_size": 2,
        "training.budget": 6, "training.log_every": 2, "training.eval_every": 2, "training.num_evals": 0,
        "training.checkpoint_every": 100, "evaluation.num_sequences": 2, "objective": "ar"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("def f(x):\n    return x + 1\n" * 300)
    return load_config(None, TINY | {"data.path": str(folder / "text.txt"), "data.cache_dir": str(folder)})


class Told(Callback):
    """What it is told, in order."""

    def __init__(self):
        self.calls = []

    def on_step(self, trainer):
        self.calls.append(("step", trainer.done.step, trainer.figures["loss"]))

    def on_log(self, trainer, values):
        self.calls.append(("log", trainer.done.step, values["loss"]))

    def on_evaluation(self, trainer, values):
        self.calls.append(("evaluation", trainer.done.step, values["next_token"]))


def weights(result):
    return [weight.tolist() for weight in result.objective.parameters()]


def test_callbacks_are_told_of_steps_logs_and_evaluations(config, tmp_path):
    told = Told()
    train(config, tmp_path / "run", callbacks=[told])
    assert [call[:2] for call in told.calls] == [
        call for step in range(1, 7)
        for call in [("step", step), *([("log", step), ("evaluation", step)] if step % 2 == 0 else [])]]
    logged = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"}
    assert {step: loss for kind, step, *rest in told.calls if kind == "log" for loss in rest} == logged
    each = {step: loss for kind, step, *rest in told.calls if kind == "step" for loss in rest}
    assert logged == {step: pytest.approx((each[step - 1] + each[step]) / 2) for step in (2, 4, 6)}


def test_steps_one_by_one_give_what_train_gives(config, tmp_path):
    whole = train(config, tmp_path / "whole")
    with open_trainer(config, tmp_path / "steps") as trainer:
        while not trainer.finished:
            trainer.step()
        with pytest.raises(UserError, match=r"is at its end, after step 6; raise training\.budget"):
            trainer.step()
    assert weights(trainer) == weights(whole)


def test_a_block_that_is_left_early_is_saved_and_gone_on_with(config, tmp_path):
    whole = train(config, tmp_path / "whole")
    with open_trainer(config, tmp_path / "run") as trainer:
        for _ in range(3):
            trainer.step()
    assert (tmp_path / "run/checkpoints/step-00000003").is_dir()
    rest = train(config, tmp_path / "run")
    assert weights(rest) == weights(whole)


def test_an_error_in_the_block_saves_nothing_and_leaves_the_folder_free(config, tmp_path):
    def one_step_and_an_error():
        with open_trainer(config, tmp_path / "run") as trainer:
            trainer.step()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        one_step_and_an_error()
    assert not (tmp_path / "run/checkpoints").exists()
    assert train(config, tmp_path / "run").step == 6


class Stopper(Callback):
    def __init__(self, hook, at):
        self.hook, self.at = hook, at
        setattr(self, hook, lambda trainer, *values: trainer.stop() if trainer.done.step >= at else None)


@pytest.mark.parametrize(("hook", "at", "step"), [("on_step", 3, 3), ("on_log", 3, 4), ("on_evaluation", 3, 4)])
def test_a_callback_ends_training_after_the_step_at_work(hook, at, step, config, tmp_path, capsys):
    result = train(config, tmp_path / "run", callbacks=[Stopper(hook, at)])
    assert (result.step, result.exit_code) == (step, 0)
    assert f"ended early: stopped after step {step}, which is saved" in capsys.readouterr().out
    assert train(config, tmp_path / "run").step == 6  # and the run goes on


def test_early_stopping_waits_for_its_patience(config, tmp_path):
    """Figures are handed in: the best is the second one, and two more are not better by enough."""
    figures = iter([3.0, 2.0, 1.95, 2.5, 1.0, 1.0])
    result = train(config.replace(**{"training.eval_every": 1}), tmp_path / "run",
                   evaluate=lambda *_: {"mine": next(figures)}, callbacks=[EarlyStopping("mine", 2, least=0.1)])
    assert result.step == 4
    assert "mine has not improved for 2 evaluations; training ends" in (tmp_path / "run" / "train.log").read_text()
    larger = iter([0.1, 0.3, 0.2, 0.9, 0.9, 0.9])
    result = train(config.replace(**{"training.eval_every": 1}), tmp_path / "larger",
                   evaluate=lambda *_: {"mine": next(larger)}, callbacks=[EarlyStopping("mine", 1, larger=True)])
    assert result.step == 3


def test_early_stopping_on_a_figure_there_is_not_is_one_sentence(config, tmp_path):
    with pytest.raises(UserError, match="no evaluation of this run has 'next_tokens'; did you mean 'next_token'"):
        train(config, tmp_path / "run", callbacks=[EarlyStopping("next_tokens")])


def test_trackers_of_accelerate_get_every_line(config, tmp_path):
    from accelerate.tracking import GeneralTracker

    class Lines(GeneralTracker):
        name, requires_logging_directory, main_process_only = "lines", False, True

        def __init__(self):
            super().__init__()
            self.lines = []

        tracker = property(lambda self: self.lines)

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **kwargs):
            self.lines.append((step, values))

    tracker = Lines()
    train(config, tmp_path / "run", callbacks=[Trackers(tracker)])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (step, values.get("train/loss", values.get("heldout/loss"))) for step, values in tracker.lines]


def test_a_tracker_that_starts_late_is_started_once(config, tmp_path):
    """The trackers of accelerate have no run or writer before `start`, which `Accelerator` calls in its own scripts."""
    class Late:
        starts = 0

        @property
        def tracker(self):
            return self.steps

        def start(self):
            self.starts, self.steps = self.starts + 1, []

        def log(self, values, step):
            self.steps.append(step)

    class Bare:
        steps = ()

        def log(self, values, step):
            self.steps = (*self.steps, step)

    late, bare = Late(), Bare()
    train(config, tmp_path / "run", callbacks=[Trackers(late, bare)])
    assert late.starts == 1
    assert tuple(late.steps) == bare.steps == (2, 2, 4, 4, 6, 6)


def test_a_callback_finds_the_line_it_is_told_of(config, tmp_path):
    """So what ends training at an evaluation, by `stop` or an error, stands in the log as its last line."""
    class Reader(Callback):
        def on_log(self, trainer, values):
            assert read_metrics(trainer.run_dir)[-1]["loss"] == values["loss"]

        def on_evaluation(self, trainer, values):
            assert read_metrics(trainer.run_dir)[-1]["next_token"] == values["next_token"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "run", callbacks=[Reader()])


def test_a_quiet_run_says_nothing_and_keeps_its_log(config, tmp_path, capsys):
    train(config, tmp_path / "quiet", quiet=True)
    assert capsys.readouterr().out == ""
    train(config, tmp_path / "loud")
    said = capsys.readouterr().out
    assert "step 2" in said
    assert len((tmp_path / "quiet/train.log").read_text().splitlines()) == len(
        (tmp_path / "loud/train.log").read_text().splitlines())
