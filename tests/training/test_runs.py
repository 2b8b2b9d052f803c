"""Run folders: one writer, one config, a stamp; and runs read back."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from looped.config import load_config
from looped.errors import UserError
from looped.training.checkpoint import list_checkpoints
from looped.training.runs import load_run, open_run
from looped.training.train import train

HOLD = """
import sys, time
from looped.config import load_config
from looped.training.runs import open_run
with open_run(load_config(None), sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_new_run_holds_a_config_that_repeats_it_and_a_stamp(tmp_path, tiny):
    config = tiny(seed=7)
    with open_run(config, tmp_path / "a" / "b", device="cpu") as path:
        assert load_config(path / "config.yaml") == config
        stamp = json.loads((path / "stamp.json").read_text())
    assert stamp["seed"] == 7
    assert stamp["versions"]["torch"] == torch.__version__
    assert {"git_sha", "git_dirty", "device", "argv", "created"} <= set(stamp)


def test_another_config_is_refused_by_its_first_difference(tmp_path, tiny):
    train(tiny(**{"training.budget": 1}), tmp_path / "run")
    with (pytest.raises(UserError, match=r"started with optim.lr 0.002, now it is 0.5; choose another --run"),
          open_run(tiny(**{"optim.lr": 0.5, "training.budget": 99}), tmp_path / "run")):
        pass
    with open_run(tiny(**{"training.budget": 1}), tmp_path / "run"):
        pass


def test_before_the_first_checkpoint_a_config_may_be_corrected(tmp_path, tiny):
    for lr in (0.5, 0.25):
        with open_run(tiny(**{"optim.lr": lr}), tmp_path / "run"):
            pass
    assert load_config(tmp_path / "run" / "config.yaml").optim.lr == 0.25


def test_the_lock_falls_with_its_holder_even_by_sigkill(tmp_path):
    config, run = load_config(None), tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"is in use by process {holder.pid} "), open_run(config, run):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with open_run(config, run):
        pass


def test_folders_of_something_else_are_left_alone(tmp_path, tiny):
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(UserError, match=r"no config.yaml but holds 'thesis.txt'"), open_run(tiny(), tmp_path):
        pass
    for path in (tmp_path / "thesis.txt", tmp_path / "thesis.txt" / "run"):
        with pytest.raises(UserError, match="is a file or lies under one"), open_run(tiny(), path):
            pass


def test_a_kill_before_the_config_is_written_does_not_block_the_folder(tmp_path, tiny):
    run = tmp_path / "run"
    run.mkdir()
    for leftover in (".lock", "stamp.json", ".tmp-config.yaml"):
        (run / leftover).write_text("")
    with open_run(tiny(), run):
        assert json.loads((run / "stamp.json").read_text())
    assert not list(run.glob(".tmp*"))


def test_a_folder_that_cannot_be_written_ends_in_one_sentence(tmp_path, tiny, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("looped.training.runs.write_text", refuse)
    with pytest.raises(UserError, match=r"cannot write to run .*Permission denied"), open_run(tiny(), tmp_path / "run"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_ends_in_one_sentence(tmp_path, tiny):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot write to run"), open_run(tiny(), tmp_path / "locked" / "run"):
        pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    run = tmp_path_factory.mktemp("finished") / "run"
    return run, train(tiny(**{"optim.ema_decay": 0.5}), run)


def test_a_run_is_read_back_with_averaged_or_plain_weights(finished):
    path, result = finished
    run, plain = load_run(path), load_run(path, ema=False)
    weights = [dict(r.objective.named_parameters()) for r in (run, plain, result)]
    name = "denoiser.model.embed.weight"
    assert torch.equal(weights[1][name], weights[2][name])
    assert not torch.equal(weights[0][name], weights[1][name])
    assert (run.step, run.config.training.budget, run.objective.training) == (8, 8, False)
    assert run.tokenizer.decode(run.tokenizer.encode("def f3(x)")) == "def f3(x)"
    assert run.data.heldout.sequences(1, 8).shape == (1, 9)


def test_a_step_can_be_chosen_and_a_wrong_one_lists_what_is_there(finished):
    path, _ = finished
    assert load_run(path, step=6).step == 6
    with pytest.raises(UserError, match="no checkpoint of step 5; it has: 6, 8"):
        load_run(path, step=5)


def test_what_is_not_a_run_is_said(tmp_path, tiny):
    with pytest.raises(UserError, match=r"is not a run: it has no config.yaml"):
        load_run(tmp_path)
    with open_run(tiny(), tmp_path / "run"):
        pass
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load_run(tmp_path / "run")


def test_a_config_that_does_not_fit_the_weights_names_the_first_tensor(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, symlinks=True)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("width: 16", "width: 24"))
    with pytest.raises(UserError, match=r"tensor 'denoiser.model.embed.weight' has shape \(\d+, 16\)"):
        load_run(run)


def test_a_damaged_newest_checkpoint_is_passed_over_and_left_in_place(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, symlinks=True)
    (run / "latest" / "ema.safetensors").write_bytes(b"")
    assert load_run(run).step == 6
    assert "damaged: ema.safetensors" in capsys.readouterr().err
    assert len(list_checkpoints(run)) == 2
    with pytest.raises(UserError, match="damaged"):
        load_run(run, step=8)
