"""`looped compare` of image generators: the table by hand, the distances of `looped eval`, paired differences."""

import json
from statistics import fmean

import pytest
import torch
import yaml
from page_checks import check_alone, first_table

from looped.cli import main
from looped.compare.image_generation_measure import DISTANCE, LOSS
from looped.evaluation.intervals import confidence_interval

pytest.importorskip("sklearn")

TINY = {
    "images": {"source": "digits", "goal": "generate", "max_train": 64, "max_heldout": 40},
    "model": {"width": 16, "num_heads": 2, "num_core_layers": 2, "num_prelude_layers": 0, "num_coda_layers": 0,
              "patch_size": 4, "injection": "none"},
    "denoise": {"context": "inject", "weight": "edm", "cond_width": 8}, "optim": {"lr": 0.01, "warmup_steps": 2},
    "training": {"batch_size": 8, "threads": 1, "num_evals": 3}, "evaluation": {"num_images": 20, "batch_size": 64},
}


@pytest.fixture(scope="module")
def done(tmp_path_factory, in_place):
    """A finished comparison of one block and of two."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    out = folder / "done"
    arms = "denoise,two=blockwise blocks.num=2"
    with in_place():
        assert main(["compare", str(folder / "tiny.yaml"), "--objectives", arms, "--budget", "layer-forwards",
                     "--amount", "400", "--seeds", "2", "--depths", "1,3", "--out", str(out), "--jobs", "2"]) == 0
    return out


def kept(out, arm, seed):
    return json.loads((out / f"{arm}-{seed}" / "eval" / "compare.json").read_text())


def test_the_table_is_what_the_runs_own_files_give_by_hand(done):
    header, *lines = first_table((done / "compare.md").read_text())
    assert header[:5] == ["arm", "loss", "against denoise", "distance, depth 1", "distance, depth 3"]
    cells = {line[0]: line for line in lines}
    for arm in ("denoise", "two"):
        found = [kept(done, arm, seed) for seed in range(2)]
        assert cells[arm][1].startswith(f"{fmean(fmean(each['loss']) for each in found):.3f} ±")
        for column, depth in ((3, 1), (4, 3)):
            distances = [row["mean"] for each in found for row in each["rows"]
                         if row["metric"] == DISTANCE.field and row["depth"] == depth]
            assert cells[arm][column].startswith(f"{fmean(distances):.3f} ±")


def test_the_difference_is_paired_by_image_and_seed(done):
    row, = (json.loads(line) for line in (done / "compare.jsonl").read_text().splitlines()
            if json.loads(line)["kind"] == "difference")
    each = torch.tensor([kept(done, "two", seed)["loss"] for seed in range(2)], dtype=torch.float64) - torch.tensor(
        [kept(done, "denoise", seed)["loss"] for seed in range(2)], dtype=torch.float64)
    assert each.shape == (2, 40)
    assert row["mean"] == pytest.approx(each.mean().item())
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(confidence_interval(each.mean(0)))


def test_the_figures_are_those_of_eval(done, capsys):
    run = done / "two-1"
    assert main(["eval", str(run), "--depths", "3", "--json", "--out", str(done / "apart")]) == 0
    rows = {(row["metric"], row.get("depth"), row.get("by")): row["mean"]
            for row in map(json.loads, capsys.readouterr().out.splitlines())}
    found = kept(done, "two", 1)
    assert rows["heldout_loss", None, None] == pytest.approx(fmean(found["loss"]))
    ours, = (row["mean"] for row in found["rows"] if row["metric"] == DISTANCE.field and row["depth"] == 3)
    assert rows[DISTANCE.field, 3, "pixels"] == pytest.approx(ours)


def test_the_page_has_the_curves_of_the_loss_and_the_distance_over_depth(done):
    reader, _ = check_alone((done / "report.html").read_text())
    assert "Fréchet distance to held-out images by solver steps" in reader.text
    assert f"Held-out {LOSS.name} over layer forwards of training" in reader.text
    for name in ("depth", "seconds", "tokens", "layer-forwards"):
        assert (done / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
