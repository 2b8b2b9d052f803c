"""What each value of an evaluation is of: eval/sequences.jsonl names document and offset, problem or image."""

import json

import numpy as np
import pytest
import torch

from looped import load_run
from looped.cli import main
from looped.config import load_config
from looped.data.token_windows import TokenStream
from looped.evaluation.intervals import Clusters, confidence_interval
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")

SMALL = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "recurrence.mean": 2,
         "recurrence.backprop": 1, "training.budget": 1, "training.batch_size": 2, "training.threads": 1,
         "training.num_evals": 0, "objective": "truncated"}


def lines(run, name):
    return [json.loads(line) for line in (run / "eval" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("sequences")
    for part in range(6):
        (path / f"{part}.txt").write_text("".join(f"{part} def f{i}(x):\n    return x + {i * part}\n"
                                                  for i in range(30 + part)))
    train(load_config(None, SMALL | {
        "data.path": str(path / "*.txt"), "data.cache_dir": str(path / "tokens"), "data.length": 16,
        "data.vocab_size": 270, "data.heldout": 0.4, "evaluation.num_sequences": 9, "evaluation.prompt_length": 4,
        "evaluation.sample_length": 4, "evaluation.num_samples": 3}), path / "run")
    assert main(["eval", str(path / "run"), "--depths", "1,3"]) == 0
    return path / "run"


def test_document_and_offset_of_each_sequence_lead_back_to_its_tokens(text_run):
    """By encoding each document anew and slicing it, the stream left aside."""
    run = load_run(text_run)
    (told,) = lines(text_run, "sequences")
    windows = run.data.heldout.sequences(9, 16)
    assert len(set(told["document"])) > 1
    for document, offset, start, window in zip(told["document"], told["offset"], told["start"], windows.tolist(),
                                               strict=True):
        ids = [*run.tokenizer.encode((text_run.parent / document).read_text()), run.data.end_of_text]
        ahead = ids[offset : offset + 17]
        assert ahead == window[: len(ahead)]
        assert run.tokenizer.decode(ahead[:-1]) in (text_run.parent / document).read_text()
        assert run.data.heldout.tokens[start : start + 17].tolist() == window


def test_the_sequences_of_all_depths_are_told_once_and_samples_name_theirs(text_run):
    run = load_run(text_run)
    (told,) = lines(text_run, "sequences")
    assert {len(line["values"]) for line in lines(text_run, "examples")} == {len(told["start"])} == {9}
    samples = lines(text_run, "samples")
    assert [(line["depth"], line["sequence"]) for line in samples] == [(d, n) for d in (1, 3) for n in range(3)]
    for line in samples:
        start = told["start"][line["sequence"]]
        assert run.tokenizer.decode(run.data.heldout.tokens[start : start + 4].tolist()) == line["prompt"]


def test_more_samples_than_sequences_are_told_as_well_and_exits_read_the_sequences_of_the_figures(text_run, tmp_path):
    """An exit that nobody takes has the loss of all steps on the same sequences."""
    assert main(["eval", str(text_run), "--depths", "3", "--evaluation.num_samples", "12", "--exits", "kl=0",
                 "--out", str(tmp_path)]) == 0
    (told,) = lines(tmp_path, "sequences")
    assert len(told["start"]) == 12
    rows = {row["metric"]: row["mean"] for row in lines(tmp_path, "depth")}
    assert rows["nats_with_exit"] == pytest.approx(rows["nats_per_token"], rel=1e-6)


def test_intervals_of_an_evaluation_are_over_the_documents_of_its_sequences(text_run, tmp_path, capsys):
    """From the files alone: the losses of examples.jsonl, drawn by the document that sequences.jsonl names."""
    for part in range(8):
        (tmp_path / f"{part}.txt").write_text(f"# {part}\n" + "def f(x):\n    return x\n" * 4)
    assert main(["eval", str(text_run), "--text", str(tmp_path), "--depths", "2", "--out", str(tmp_path / "out"),
                 "--exits", "kl=1e-3", "--probes", "--evaluation.num_sequences", "16"]) == 0
    said = capsys.readouterr().out
    assert "nats/token over 16 held-out sequences of 8 documents\n" in said
    (told,), values = lines(tmp_path / "out", "sequences"), {}
    for line in lines(tmp_path / "out", "examples"):
        values[line["metric"]] = torch.tensor(line["values"], dtype=torch.float64)
    labels = torch.tensor([int(name[0]) for name in told["document"]])
    clusters = Clusters(labels, torch.zeros_like(labels))
    assert (len(clusters), clusters.suffice) == (16, True)
    rows = {row.get("metric"): row for name in ("depth", "probes") for row in lines(tmp_path / "out", name)}
    for name in ("nats_per_token", "nats_with_exit", "scrambled_context_costs"):
        assert (rows[name]["n"], rows[name]["clusters"]) == (16, 8)
    nats = values["nats_per_token"]
    row = rows["nats_per_token"]
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(confidence_interval(nats, clusters))
    assert (row["ci_low"], row["ci_high"]) != pytest.approx(confidence_interval(nats))


def test_an_end_of_text_is_the_last_token_of_its_document_and_documents_may_have_no_names():
    tokens = np.array([5, 6, 0, 7, 0, 8, 9, 5, 0])
    stream = TokenStream("held-out", tokens, end_of_text=0, documents=("a", "b", "c"))
    assert stream.places(4, 2) == {"document": ["a", "a", "b", "c"], "offset": [0, 2, 1, 1], "start": [0, 2, 4, 6]}
    assert stream.places(99, 2)["start"] == stream.places(4, 2)["start"]
    bare = TokenStream("held-out", tokens, end_of_text=0)
    assert bare.places(4, 2) == stream.places(4, 2) | {"document": [None] * 4}


def test_problems_are_told_by_seed_difficulty_and_index(tmp_path):
    train(load_config(None, SMALL | {"task.name": "prefix-sums", "task.difficulty": [2, 4],
                                     "evaluation.num_problems": 5, "evaluation.difficulties": [3]}), tmp_path / "run")
    for levels in ("3,5", "5"):  # the second evaluation tells no difficulty twice
        assert main(["eval", str(tmp_path / "run"), "--depths", "1,2", "--difficulties", levels]) == 0
    told = {line["difficulty"]: line for line in lines(tmp_path / "run", "sequences")}
    assert [line["difficulty"] for line in lines(tmp_path / "run", "sequences")] == [3, 5]
    data = load_run(tmp_path / "run").data
    for level in (3, 5):
        assert told[level]["index"] == list(range(5))
        for number, index in enumerate(told[level]["index"]):
            problem = data.task.problem(told[level]["seed"], index, level, heldout=True)
            assert problem.inputs.tolist() == data.heldout(5, level)[number].inputs.tolist()


@pytest.mark.parametrize("settings", [
    {"images.goal": "classify", "model.patch_size": 4},
    {"images.goal": "generate", "model.patch_size": 4, "objective": "denoise", "denoise.context": "inject",
     "denoise.weight": "edm", "denoise.cond_width": 8, "model.injection": "none", "model.num_prelude_layers": 0,
     "model.num_coda_layers": 0, "evaluation.num_images": 10, "evaluation.num_samples": 1}])
def test_images_are_told_by_index_and_class(settings, tmp_path):
    pytest.importorskip("sklearn")
    train(load_config(None, SMALL | {"images.source": "digits", "images.max_train": 32, "images.max_heldout": 12}
                      | settings), tmp_path / "run")
    assert main(["eval", str(tmp_path / "run"), "--depths", "1"]) == 0
    (told,) = lines(tmp_path / "run", "sequences")
    assert told["index"] == list(range(12))
    labels = torch.from_numpy(load_run(tmp_path / "run").data.images.heldout.pictures.labels)
    assert told["label"] == labels.tolist()
    assert {len(line["values"]) for line in lines(tmp_path / "run", "examples")} == {12}
