"""The words of `looped eval` on text: on how much it was measured, the solver's own figure, and texts too short."""

import json

import pytest

from looped.cli import main
from looped.config import load_config
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")

TINY = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "denoise.cond_width": 8,
        "training.budget": 1, "training.batch_size": 2, "training.threads": 1, "data.length": 16,
        "data.vocab_size": 270,
        "data.heldout": 0.4, "evaluation.num_sequences": 5, "evaluation.prompt_length": 4, "evaluation.num_samples": 1,
        "evaluation.sample_length": 4, "evaluation.depths": [1, 2]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A denoiser and a loop, with short texts beside them."""
    path = tmp_path_factory.mktemp("words")
    for part in range(6):
        (path / f"{part}.txt").write_text(f"{part} " + "def f(x):\n    return x + 1\n" * 40)
    (path / "shortest.txt").write_text("few")
    (path / "short.txt").write_text("quite another text, and")
    for rule in ("denoise", "full"):
        train(load_config(None, TINY | {"objective": rule, "data.path": str(path / "[0-9].txt"),
                                        "data.cache_dir": str(path / "tokens")}), path / rule, quiet=True)
    return path


def said(capsys, *words):
    capsys.readouterr()
    code = main(["eval", *map(str, words)])
    told = capsys.readouterr()
    return told.out if code == 0 else told.err


def test_the_number_of_sequences_is_told_and_one_has_no_interval(folder, capsys):
    assert "over 5 held-out sequences of 3 documents, which their intervals take as independent\n" in \
        said(capsys, folder / "full")
    told = said(capsys, folder / "full", "--text", folder / "short.txt", "--out", folder / "out")
    assert "nats/token over 1 held-out sequence, too few for an interval" in told
    rows = [json.loads(line) for line in (folder / "out/eval/depth.jsonl").read_text().splitlines()]
    assert [row["n"] for row in rows if row["metric"] == "nats_per_token"] == [1, 1]
    assert not any("ci_low" in row for row in rows if row["metric"] in ("nats_per_token", "bits_per_byte"))


def test_a_text_shorter_than_a_sequence_is_refused_with_what_can_be_done(folder, capsys):
    told = said(capsys, folder / "full", "--text", folder / "shortest.txt")
    assert "data.length 16 needs 17 tokens, but the given text has" in told
    assert "; give a longer one, or measure it in Python by looped.evaluate_depth" in told
    assert "heldout;" not in told


def test_the_figure_of_the_solver_itself_is_in_the_table(folder, capsys):
    assert "by solver" not in said(capsys, folder / "denoise")
    told = said(capsys, folder / "denoise", "--trajectories", 2)
    header, _, first, *_ = (line for line in told.splitlines() if line.startswith("|"))
    rows = [json.loads(line) for line in (folder / "denoise/eval/depth.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["metric"] == "nats_by_solver" and row["depth"] == 1]
    assert first.split("|")[header.split("|").index(next(name for name in header.split("|") if "by solver" in name))] \
        .split()[0] == f"{row['mean']:.3f}"
    assert "under the mean prediction of 2 trajectories" in told


def test_trajectories_of_what_has_no_solver_are_refused(folder, capsys):
    assert "--trajectories 2 samples the solver of a denoiser, and objective full has none; leave it out" in \
        said(capsys, folder / "full", "--trajectories", 2)
