"""What a run tells: each step once in metrics.jsonl, plain lines in a pipe, a bar on a terminal, wandb by flag."""

import json
import os
import pty
import subprocess
import sys

import pytest

from looped.config import dump_config
from looped.errors import UserError
from looped.training.logs import TIMING, Meter, Monitor, append, keep_until, read_metrics
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

SCRIPT = """
import sys
from looped.config import load_config
from looped.training.train import train
train(load_config(sys.argv[1]), sys.argv[2])
"""


def test_a_meter_that_was_saved_goes_on_to_the_same_means():
    values = [{"loss": 0.1 * i, **({"rare": 1.0 / (i + 1)} if i % 2 else {})} for i in range(7)]
    whole, first = Meter(), Meter()
    for value in values:
        whole.add(value)
    for value in values[:3]:
        first.add(value)
    second = Meter(json.loads(json.dumps(first.sums)))
    for value in values[3:]:
        second.add(value)
    assert second.means() == whole.means()
    assert whole.means()["loss"] == pytest.approx(0.3)
    assert whole.means()["rare"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 6) / 3)


def test_meters_of_processes_join():
    meters = [Meter(), Meter()]
    for meter, loss in zip(meters, (1.0, 3.0), strict=True):
        meter.add({"loss": loss})
    meters[1].add({"at_max": 5.0})
    joint = Meter()
    joint.merge([meter.sums for meter in meters])
    assert joint.means() == {"loss": 2.0, "at_max": 5.0}


def test_lines_after_the_checkpoint_and_torn_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    keep_until(path, 3)
    assert not path.exists()
    path.write_text('{"step": 2}\nrubbish\n{"step": 4}\n{"step": 3}\n{"st')
    keep_until(path, 3)
    assert path.read_text() == '{"step": 2}\n{"step": 3}\n'
    keep_until(path, 0)
    assert path.read_text() == ""


def test_a_line_that_cannot_be_written_ends_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*run the same command again"):
        append(tmp_path, "text")


def test_a_name_that_is_not_utf_8_is_escaped_in_the_log(tmp_path):
    append(tmp_path / "train.log", os.fsdecode(b"caf\xe9") + " and é\n")
    assert (tmp_path / "train.log").read_text(encoding="utf-8") == "caf\\udce9 and é\n"


def test_other_processes_are_silent(tmp_path, tiny, capsys):
    with Monitor(tmp_path, tiny(), main=False) as monitor:
        monitor.say("hello")
        monitor.metrics("train", 1, {"loss": 1.0})
        monitor.progress(1, 0.5, {"loss": 1.0})
        monitor.rewind(0)
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_a_run_in_a_pipe_prints_plain_lines_that_are_also_in_its_log(tmp_path, tiny, capsys):
    train(tiny(**{"training.eval_every": 4}), tmp_path / "run")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert (tmp_path / "run" / "train.log").read_text() == out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("train", 3), ("heldout", 4), ("train", 6), ("train", 8), ("heldout", 8)]
    assert {"loss", "ce_at_max", "grad_norm", "lr", "tokens", "layer_forwards", *TIMING} <= rows[0].keys()
    assert read_metrics(str(tmp_path / "run")) == read_metrics(tmp_path / "run") == rows


def test_a_terminal_gets_a_bar_and_the_log_the_plain_lines(tmp_path, tiny):
    (tmp_path / "config.yaml").write_text(dump_config(tiny()))
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, tmp_path / "config.yaml", tmp_path / "run"],
                               stdout=theirs, env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait() == 0
    assert b"\x1b[" in shown
    assert "━".encode() in shown
    log = (tmp_path / "run" / "train.log").read_text()
    assert "step 8  100.0%  loss" in log
    assert "\x1b" not in log


def test_wandb_offline_writes_into_the_run_and_needs_no_network(tmp_path, tiny, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "")
    train(tiny(**{"training.wandb": "offline"}), tmp_path / "run")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_wandb_missing_is_said_with_the_way_out(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"set training\.wandb to off"):
        train(tiny(**{"training.wandb": "online"}), tmp_path / "run")
