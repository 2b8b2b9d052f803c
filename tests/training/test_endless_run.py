"""A run on a stream goes on where it was: the same batches and weights, on one process and on two."""

import json
import os
import subprocess
import sys

import endless_runs
import pytest
import torch
from same_runs import assert_same

from looped.config import dump_config, load_config
from looped.data.text import prepare
from looped.errors import UserError
from looped.training import trainer as trainers
from looped.training.checkpoint import list_checkpoints
from looped.training.draw_ahead import DrawAhead
from looped.training.logs import read_metrics
from looped.training.runs import load_run
from looped.training.step_checks import bad_rows
from looped.training.train import open_trainer, train

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def stream(tiny, text_folder, tmp_path_factory):
    """`stream(**changes)`: the config of a run of 20 steps on the lines of some files, streamed."""
    folder = tmp_path_factory.mktemp("stream")
    for number, file in enumerate(sorted(text_folder.glob("*.txt"))[:3]):
        lines = [{"text": part} for part in file.read_text(encoding="utf-8").split("\n\n") if part]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tokenizer := folder.with_name("t.json")).write_text(prepare(tiny().data).tokenizer.json(), encoding="utf-8")

    def make(**changes):
        return tiny(**{"objective": "truncated", "data.path": [], "data.dataset": str(folder),
                       "data.streaming": "endless", "data.tokenizer": str(tokenizer), "data.heldout_bytes": 900,
                       "training.batch_size": 4, "training.budget": 20, "training.accumulation": 2,
                       "training.checkpoint_every": 5, "training.eval_every": 10} | changes)

    return make


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def check_twenty_steps(folder, num):
    """Those of `endless_runs` have the same batches and leave the same weights."""
    batches = [[torch.load(folder / f"{name}-{rank}.pt") for name in ("whole", "again")] for rank in range(num)]
    for whole, again in batches:
        assert len(whole) == len(again) == 40
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(whole, again, strict=True))
        assert not torch.equal(whole[0], whole[20])  # the control: the stream moves on
    assert len({tuple(whole[0].flatten().tolist()) for whole, _ in batches}) == num
    assert_same(folder / "again", folder / "whole")
    state = json.loads((list_checkpoints(folder / "again")[0] / "state.json").read_text(encoding="utf-8"))
    assert len(state["places"]) == num


def test_twenty_steps_are_ten_and_ten_to_the_bit(stream, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(stream()), encoding="utf-8")
    endless_runs.main(tmp_path)
    check_twenty_steps(tmp_path, 1)


@pytest.mark.slow
def test_so_they_are_on_two_processes_and_one_is_refused(stream, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(stream()), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               endless_runs.__file__, tmp_path]
    settings = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | settings)
    assert done.returncode == 0, done.stderr[-5000:]
    check_twenty_steps(tmp_path, 2)
    with pytest.raises(UserError, match=r"the places of 2 processes .*, and their number now is 1; start 2 processes"):
        train(load_config(tmp_path / "config.yaml"), tmp_path / "again", quiet=True)


class Threaded(DrawAhead):
    """As on a device."""

    def __init__(self, *args, threaded):
        super().__init__(*args, threaded=True)


def test_what_a_thread_has_drawn_ahead_is_drawn_again(stream, tmp_path, monkeypatch):
    train(stream(), tmp_path / "whole", quiet=True)
    monkeypatch.setattr(trainers, "DrawAhead", Threaded)
    with open_trainer(stream(), tmp_path / "again", quiet=True) as trainer:
        for _ in range(7):
            trainer.step()
    train(stream(), tmp_path / "again", quiet=True)
    assert_same(tmp_path / "again", tmp_path / "whole")


def test_a_run_on_a_stream_is_evaluated_on_its_first_documents(stream, tmp_path):
    train(stream(), tmp_path / "run", quiet=True)
    run = load_run(tmp_path / "run")
    assert run.data.heldout.documents[0] == "train#0"
    assert run.identity.facts["held-out tokens"] == len(run.data.heldout)
    assert [line["step"] for line in read_metrics(tmp_path / "run") if line["kind"] == "heldout"] == [10, 20]


def test_a_row_that_is_not_finite_is_named_by_its_documents(stream, tmp_path):
    with open_trainer(stream(), tmp_path / "run", quiet=True) as trainer:
        trainer.step()
        before = trainer.data.train.place(1)
        assert bad_rows(trainer) == []
        assert trainer.data.train.place(1) == before
        with torch.no_grad():
            next(trainer.objective.parameters()).fill_(float("nan"))
        with pytest.raises(UserError, match=r"at step 1 \(row 0: train#\d+ of rank 0, epoch 0"):
            trainer.step()


def test_a_run_on_other_text_keeps_no_place(tiny, tmp_path):
    train(tiny(), tmp_path / "run", quiet=True)
    state = json.loads((list_checkpoints(tmp_path / "run")[0] / "state.json").read_text(encoding="utf-8"))
    assert state["places"] is None
