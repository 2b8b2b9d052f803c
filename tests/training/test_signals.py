"""Signals end a run after its step, or save: two SIGTERMs as one, only a second Ctrl-C at once."""

import os
import signal
import subprocess
import sys

import pytest
from same_runs import assert_same, figures

from looped.data.from_config import find_data
from looped.training import checkpoint as ckpt
from looped.training.logs import read_metrics
from looped.training.signals import SAVING, catch_signals
from looped.training.train import open_trainer, train

pytestmark = pytest.mark.usefixtures("unchecked")


def test_a_second_sigterm_changes_nothing():
    with catch_signals() as caught:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught.number == signal.SIGTERM


@pytest.fixture
def usual_ctrl_c():
    """Python's own handler, which a process that runs in the background lacks."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_ctrl_c")
def test_a_second_ctrl_c_ends_at_once():
    with catch_signals() as caught:
        os.kill(os.getpid(), signal.SIGINT)
        assert caught.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("usual_ctrl_c")
@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_while_text_is_read_ends_at_once(tmp_path, tiny, monkeypatch, capfd, number, ends):
    opened, later = find_data, []

    def interrupted(config):
        os.kill(os.getpid(), number)
        later.append("read on")
        return opened(config)

    monkeypatch.setattr("looped.training.train.find_data", interrupted)
    with pytest.raises(ends) as ended:
        train(tiny(objective="ar"), tmp_path / "run")
    assert not later
    assert number == signal.SIGINT or ended.value.code == 143
    assert capfd.readouterr().err.strip() == "ended before a step was taken; the same command starts again"
    monkeypatch.undo()
    assert train(tiny(objective="ar"), tmp_path / "run", quiet=True).step == 8


@pytest.mark.parametrize("number", SAVING)
def test_usr_signals_save_after_the_step_and_training_goes_on(tmp_path, tiny, number):
    config = tiny(objective="ar", **{"training.checkpoint_every": 0})
    with open_trainer(config, tmp_path / "run", quiet=True) as trainer:
        trainer.step()
        assert not ckpt.list_checkpoints(tmp_path / "run")
        os.kill(os.getpid(), number)
        trainer.step()
        trainer.saver.wait()
        assert [path.name for path in ckpt.list_checkpoints(tmp_path / "run")] == ["step-00000002"]
        trainer.step()
        trainer.saver.wait()
        assert len(ckpt.list_checkpoints(tmp_path / "run")) == 1  # one signal, one checkpoint


def test_an_evaluation_that_was_interrupted_costs_no_step_and_is_made_up_for(tmp_path, tiny):
    """A run that ends during the evaluation of step 4 is saved at step 4, and evaluated when it goes on."""
    config = tiny(objective="ar", **{"training.eval_every": 4, "training.checkpoint_every": 4, "training.budget": 6})
    train(config, tmp_path / "whole", quiet=True)

    def interrupted(*_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(config, tmp_path / "run", evaluate=interrupted, quiet=True)
    assert [path.name for path in ckpt.list_checkpoints(tmp_path / "run")] == ["step-00000004"]
    train(config, tmp_path / "run", quiet=True)
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert [line["step"] for line in read_metrics(tmp_path / "run") if line["kind"] == "heldout"] == [4, 6]
    before = figures(tmp_path / "run")
    train(config, tmp_path / "run", quiet=True)
    assert figures(tmp_path / "run") == before  # and not again


def test_an_interrupted_last_evaluation_is_made_up_for_by_a_run_that_has_nothing_left_to_train(tmp_path, tiny):
    def interrupted(*_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(tiny(objective="ar"), tmp_path / "run", evaluate=interrupted, quiet=True)
    train(tiny(objective="ar"), tmp_path / "run", quiet=True)
    assert [line["step"] for line in read_metrics(tmp_path / "run") if line["kind"] == "heldout"] == [8]


def test_in_a_thread_signals_are_left_alone():
    code = ("import threading; from looped.training.signals import catch_signals\n"
            "def work():\n    with catch_signals() as caught: print(caught.number)\n"
            "thread = threading.Thread(target=work); thread.start(); thread.join()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.returncode) == ("0", 0)
