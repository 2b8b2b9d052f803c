"""Depth curve, contraction, exits and cost of imported models: what `looped eval` measures of any run."""

import json

import looped_folders
import pytest
import test_pretrained
import torch
from tiny_models import TEXT, byte_level

from looped.cli import main
from looped.objectives.base import token_losses
from looped.training.runs import load_run

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("unchecked")

VOCAB, DEPTHS = 352, (1, 2, 4)
MAKERS = {"huginn": looped_folders.huginn, "retrofit": looped_folders.retrofit, "ouro": looped_folders.ouro,
          "nanbeige": lambda folder: (test_pretrained.saved(folder), test_pretrained.change(
              folder, model_type="nanbeige", num_loops=2)), "llama": test_pretrained.saved}
LAYERS = {"huginn": (2, 2, 1), "retrofit": (2, 2, 1), "ouro": (0, 6, 0), "nanbeige": (0, 6, 0), "llama": (2, 2, 1)}


@pytest.fixture(scope="module", params=MAKERS)
def measured(request, tmp_path_factory):
    """(name, run, lines of its evaluation) of a model with room for a tokenizer."""
    name, root = request.param, tmp_path_factory.mktemp("probes")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looped_folders, "VOCAB", VOCAB)
        for table, key in ((looped_folders.HUGINN, "padded_vocab_size"), (looped_folders.RETROFIT, "padded_vocab_size"),
                           (test_pretrained.SIZES, "vocab_size")):
            patch.setitem(table, key, VOCAB)
        (root / "model").mkdir()
        MAKERS[name](root / "model")
    byte_level().save(str(root / "tokenizer.json"))
    test_pretrained.change(root / "model", eos_token_id=0)
    cut = ["--layers", "2/2/1"] if name == "llama" else []
    assert main(["import", str(root / "model"), "--out", str(root / "run"), "--tokenizer", str(root / "tokenizer.json"),
                 "--data.path", str(root / "text.txt"), "--data.length", "32", *cut]) == 0
    exits = "kl=0.05,latent,confidence" + (",gate" if name == "ouro" else "")
    assert main(["eval", str(root / "run"), "--depths", ",".join(map(str, DEPTHS)), "--probes", "--exits", exits,
                 "--evaluation.num_sequences", "4"]) == 0
    lines = [json.loads(line) for line in (root / "run/eval/depth.jsonl").read_text().splitlines()]
    probes = [json.loads(line) for line in (root / "run/eval/probes.jsonl").read_text().splitlines()]
    return name, load_run(root / "run"), lines, probes


def of(lines, metric):
    return {line.get("depth"): line for line in lines if line.get("metric") == metric}


@torch.no_grad()
def test_the_depth_curve_is_the_loss_of_the_imported_weights(measured):
    """Worked out from the logits of a call, where no initial state is drawn."""
    _, run, lines, _ = measured
    model, found = run.objective.model, of(lines, "nats_per_token")
    assert set(found) == set(DEPTHS)
    if not model.recurrence.needs_noise:
        tokens = run.data.heldout.sequences(found[1]["n"], 32)
        for depth in DEPTHS:
            expected = token_losses(model(tokens[:, :-1], depth), tokens[:, 1:]).mean().item()
            assert found[depth]["mean"] == pytest.approx(expected, rel=1e-4)


def test_the_cost_is_counted_from_its_layers(measured):
    name, _, lines, _ = measured
    prelude, core, coda = LAYERS[name]
    for depth, line in of(lines, "nats_per_token").items():
        assert line["layer_forwards"] == prelude + depth * core + coda


def test_its_states_are_followed(measured):
    name, _, _, probes = measured
    assert set(of(probes, "state_rms")) == {1, 2, 3, 4}
    assert set(of(probes, "contraction")) == {3, 4}
    if name in ("llama", "retrofit"):  # [0 | I] leaves the state out: each pass ends where the last one did
        assert of(probes, "contraction")[4]["mean"] < 1e-3


def test_tokens_leave_early(measured):
    name, _, lines, _ = measured
    used = {line["by"]: line["mean"] for line in lines if line["metric"] == "steps_used"}
    assert len(used) == (4 if name == "ouro" else 3)
    assert all(1 <= steps <= 4 for steps in used.values())
    if name in ("llama", "retrofit"):
        assert used["kl=0.05"] == 2  # the second readout is the first
