"""A run that learns to solve problems: trained, resumed bit for bit, measured over depth and difficulty, by command."""

import json

import pytest

from looped.cli import main
from looped.config import load_config
from looped.training.checkpoint import list_checkpoints
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

TINY = {
    "task.name": "prefix-sums", "task.difficulty": [2, 4], "denoise.context": "inject", "model.width": 32,
    "model.num_heads": 2, "model.num_core_layers": 1, "denoise.cond_width": 8, "denoise.target.dim": 4,
    "recurrence.mean": 2, "recurrence.backprop": 1, "optim.warmup_steps": 3, "training.batch_size": 8,
    "training.budget": 6, "training.threads": 1, "training.log_every": 3, "training.checkpoint_every": 3,
    "evaluation.depths": [1, 2], "evaluation.num_problems": 8,
}


def weights(run):
    return {path.name: path.read_bytes() for path in list_checkpoints(run)[0].glob("*.safetensors")}


def lines(run, kind):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


@pytest.mark.parametrize("objective", ["full", "truncated", "denoise", "ar"])
@pytest.mark.parametrize("layout", ["full", "causal"])
def test_every_rule_trains_on_problems_in_both_layouts(tmp_path, objective, layout):
    config = load_config(None, TINY | {"objective": objective, "task.layout": layout})
    result = train(config, tmp_path / "run")
    assert result.step == 6
    last = lines(tmp_path / "run", "heldout")[-1]
    assert 0 <= last["solved"] <= 1
    assert last["best_depth"] in (1, 2)


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path):
    config = load_config(None, TINY)
    train(config, tmp_path / "whole")
    train(config, tmp_path / "cut")
    newest = list_checkpoints(tmp_path / "cut")[0]
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    train(config, tmp_path / "cut")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_tokens_are_counted_as_they_are_seen(tmp_path):
    config = load_config(None, TINY | {"task.difficulty": [3, 3]})
    train(config, tmp_path / "run")
    assert lines(tmp_path / "run", "train")[-1]["tokens"] == 6 * 8 * (1 + 3)  # with the start marker


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "steps"), [("denoise", 300), ("full", 600)])
def test_prefix_sums_of_four_bits_are_learned(tmp_path, objective, steps):
    config = load_config(None, TINY | {
        "objective": objective, "task.difficulty": [4, 4], "recurrence.mean": 4, "recurrence.loss_on": "every",
        "recurrence.per_sequence": False, "training.budget": steps, "training.batch_size": 32,
        "evaluation.depths": [1, 4], "evaluation.num_problems": 64})
    train(config, tmp_path / "run")
    assert lines(tmp_path / "run", "heldout")[-1]["solved"] > 0.9


def test_a_run_is_measured_over_depth_and_difficulty_by_command(tmp_path, capsys):
    run = tmp_path / "run"
    train(load_config(None, TINY), run)
    assert main(["eval", str(run), "--depths", "1,3", "--difficulties", "2,6", "--exits", "kl,answer=2"]) == 0
    said = capsys.readouterr().out
    assert "| bits |" in said
    assert "answer=2" in said
    rows = [json.loads(line) for line in (run / "eval/depth.jsonl").read_text().splitlines()]
    assert {(row["difficulty"], row["depth"]) for row in rows if row["metric"] == "solved"} == {
        (2, 1), (2, 3), (6, 1), (6, 3)}
    examples = [json.loads(line) for line in (run / "eval/examples.jsonl").read_text().splitlines()]
    for row in rows:
        if row["metric"] == "solved":
            values = next(each["values"] for each in examples
                          if (each["difficulty"], each["depth"]) == (row["difficulty"], row["depth"]))
            assert len(values) == row["n"] == 8
            assert sum(values) / 8 == row["mean"]
    page = (run / "report.html").read_text()
    assert "Early exit" in page
    assert "bits 6:" in page
    tokens = lines(run, "train")[-1]["tokens"]
    assert f"layer forwards, {tokens:,} tokens" in page
    assert main(["eval", str(run), "--json"]) == 0
    assert {json.loads(line)["difficulty"] for line in capsys.readouterr().out.splitlines()} == {16, 32, 64}


@pytest.mark.parametrize(("flags", "words"), [
    (["--probes"], "--probes is for text"),
    (["--judge", "x"], "--judge is for text"),
    (["--trajectories", "3"], "--evaluation.trajectories"),
    (["--difficulties", "a"], "not a list of whole numbers"),
    (["--difficulties", "0"], "prefix-sums begins at difficulty 1"),
    (["--exits", "kl1"], "did you mean 'kl'"),
    (["--exits", "head"], "--objective one-step"),
    (["--task.name", "sudoku"], "was fixed when"),
])
def test_what_does_not_fit_a_task_is_one_sentence(tmp_path, capsys, flags, words):
    run = tmp_path / "run"
    train(load_config(None, TINY | {"training.budget": 1}), run)
    capsys.readouterr()
    assert main(["eval", str(run), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_task_run_does_not_write_texts(tmp_path, capsys):
    run = tmp_path / "run"
    train(load_config(None, TINY | {"training.budget": 1}), run)
    capsys.readouterr()
    assert main(["generate", str(run)]) == 2
    assert "looped eval" in capsys.readouterr().err


def test_a_problem_and_its_answer_are_shown_while_training(tmp_path):
    train(load_config(None, TINY | {"training.sample_every": 3, "task.difficulty": [4, 4]}), tmp_path / "run")
    said = (tmp_path / "run/train.log").read_text()
    assert "step 3  sample\ndepth 4\n" in said
