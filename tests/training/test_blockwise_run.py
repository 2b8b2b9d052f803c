"""A run of several blocks from the command line: it is trained, described and measured, on text and on a task."""

import json

import pytest

from looped.cli import main
from looped.config import dump_config

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

SMALL = {"objective": "blockwise", "blocks.num": 3, "model.num_core_layers": 3, "training.budget": 4,
         "evaluation.depths": [1, 3], "evaluation.num_samples": 1, "evaluation.sample_length": 4,
         "evaluation.num_problems": 4}


def trained(config, folder):
    (folder / "config.yaml").write_text(dump_config(config))
    assert main(["train", str(folder / "config.yaml"), "--run", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.parametrize("shared", ["trained", "frozen"])
def test_a_run_on_text_is_trained_and_measured(tmp_path, tiny, capsys, shared):
    run = trained(tiny(**SMALL, **{"blocks.shared": shared}), tmp_path)
    assert main(["eval", str(run), "--probes"]) == 0
    assert (run / "plots" / "partition.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (run / "eval" / "depth.jsonl").read_text().splitlines()]
    forwards = {row["depth"]: row["layer_forwards"] for row in rows if row["metric"] == "nats_per_token"}
    assert forwards == {1: 1 + 1 + 1, 3: 1 + 3 + 3}
    capsys.readouterr()
    assert main(["info", str(run)]) == 0
    assert "a core of 3 blocks of 1, 1, 1 layers" in capsys.readouterr().out
    assert main(["generate", str(run), "--num-tokens", "3", "--depth", "3"]) == 0


def test_a_run_on_a_task_is_trained_and_measured(tmp_path, tiny):
    run = trained(tiny(**SMALL, **{"task.name": "prefix-sums", "denoise.context": "inject"}), tmp_path)
    assert main(["eval", str(run), "--difficulties", "8", "--exits", "kl"]) == 0
    assert (run / "plots" / "partition.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "report.html").exists()


def test_its_end_to_end_twin_is_measured_at_one_pass_through_all_blocks(tmp_path, tiny):
    run = trained(tiny(**SMALL | {"objective": "ar"}), tmp_path)
    assert main(["eval", str(run), "--depths", "1,3"]) == 0
    rows = [json.loads(line) for line in (run / "eval" / "depth.jsonl").read_text().splitlines()]
    assert {row["depth"] for row in rows if row["metric"] == "nats_per_token"} == {1, 3}
