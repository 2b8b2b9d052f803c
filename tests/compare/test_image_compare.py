"""`looped compare` on images: the table by hand, figures of one difficulty, every rule, every patch size that fits."""

import json
from pathlib import Path
from statistics import fmean

import pytest
import torch
import yaml
from page_checks import check_alone, first_table

from looped.cli import main
from looped.compare.accuracy_summary import summarise_shares
from looped.compare.accuracy_table import share_table
from looped.compare.classify_measure import ImageMeasured, check_images
from looped.compare.comparison_kinds import IMAGES, kind_of
from looped.compare.compute_to_target import sentence
from looped.compare.matched_compute import equal_table
from looped.compare.plan import RunSpec, make_plan
from looped.config import load_config
from looped.config.arms import Arm
from looped.config.rules import RULES

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

pytest.importorskip("sklearn")

TINY = {
    "images": {"source": "digits"},
    "model": {"width": 16, "num_heads": 2, "num_core_layers": 3, "num_prelude_layers": 0, "num_coda_layers": 0,
              "patch_size": 4}, "recurrence": {"mean": 2, "backprop": 1},
    "denoise": {"context": "inject", "bridge": "soft", "start": "zero", "cond_width": 8, "target": {"dim": 4}},
    "optim": {"lr": 0.01, "warmup_steps": 2},
    "training": {"batch_size": 32, "threads": 1, "checkpoint_every": 100, "num_evals": 3},
    "evaluation": {"depths": [1, 2], "batch_size": 180},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The config, and the command but for its arms and where it goes."""
    path = tmp_path_factory.mktemp("images") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return ["compare", str(path), "--budget", "layer-forwards", "--amount", "6000", "--seeds", "1", "--depths", "1,4"]


@pytest.fixture(scope="module")
def done(tiny, in_place):
    """A finished comparison of patches of two sizes, one of them in three blocks."""
    out = Path(tiny[1]).parent / "done"
    arms = "small=full model.patch_size=2,three=blockwise blocks.num=3"
    with in_place():
        assert main([*tiny, "--objectives", arms, "--out", str(out), "--jobs", "2"]) == 0
    return out


def rows_of(out):
    return [json.loads(line) for line in (out / "compare.jsonl").read_text().splitlines()]


def test_the_table_is_what_the_runs_own_files_give_by_hand(done):
    header, *lines = first_table((done / "compare.md").read_text())
    assert header[:5] == ["arm", "trained depth", "best depth", "deepest", "against small"]
    shares = {}
    for line, trained in zip(lines, ("2", "3"), strict=True):
        cells = dict(zip(header, line, strict=True))
        (right,) = json.loads((done / f"{line[0]}-0/eval/compare.json").read_text())["right"].values()
        assert {depth: len(each) for depth, each in right.items()} == dict.fromkeys(sorted(["1", "4", trained]), 180)
        best = max(sorted(right, key=int), key=lambda depth, right=right: fmean(right[depth][0::2]))
        shares[line[0]] = fmean(right[best][1::2])
        for column, depth in (("trained depth", trained), ("best depth", best), ("deepest", "4")):
            assert cells[column] == f"{fmean(right[depth][1::2]):.3f} ({depth})"
    assert float(lines[1][4].split()[0]) == pytest.approx(shares["three"] - shares["small"], abs=5e-4)


def test_every_figure_is_of_all_images_and_curves_are_of_their_accuracy(done):
    rows = rows_of(done)
    assert {row["kind"] for row in rows} >= {"figure", "cost", "share", "difference", "equal"}
    assert {(row["metric"], row["n"]) for row in rows if row["kind"] == "figure"} == {("accuracy", 180)}
    assert not any("difficulty" in row for row in rows)
    costs = {row["arm"]: row["layer_forwards"] for row in rows if row["kind"] == "cost"}
    assert len(costs) == 2
    assert all(6000 <= spent < 7000 for spent in costs.values())
    least = min(costs, key=costs.__getitem__)  # who ends where all are equal
    last = [line for line in map(json.loads, (done / f"{least}-0/metrics.jsonl").read_text().splitlines())
            if line["kind"] == "heldout"][-1]
    equal = {(row["arm"], row["budget"]): row for row in rows if row["kind"] == "equal"}[least, "layer_forwards"]
    assert (equal["mean"], equal["spent"]) == (pytest.approx(last["accuracy"]), costs[least])


def test_the_page_speaks_of_images_and_says_what_the_arms_are(done):
    reader, pictures = check_alone((done / "report.html").read_text())
    assert len(pictures) == 5
    for said in ("the same held-out images", "small and three", "full model.patch_size=2", "classified correctly",
                 "chosen on one half of the 180 held-out images", "on the other 90 images"):
        assert said in reader.text
    assert "problem" not in reader.text


def test_the_same_command_again_does_nothing(done, tiny, capsys):
    again = [*tiny, "--objectives", "small=full model.patch_size=2,three=blockwise blocks.num=3", "--out", str(done)]
    assert main(again) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 runs are trained already" in shown
    assert "evaluating" not in shown


@pytest.mark.parametrize("objective", [name for name in RULES if name != "masked"])
def test_every_rule_for_images_is_compared(objective):
    config = load_config(None, {"model.num_core_layers": 3, "denoise.context": "inject", "images.source": "digits"})
    settings = " blocks.num=3" if objective in ("blockwise", "noprop-dt") else ""
    if objective == "forward-forward":
        settings = " model.injection=none model.num_prelude_layers=0 model.num_coda_layers=0"
    plan = make_plan(config, objective + settings, budget=("seconds", 1), num_seeds=1, depths=None, out=Path("out"))
    check_images(plan)
    assert kind_of(plan.config) is IMAGES


@pytest.mark.parametrize(("changes", "why"), [
    (["--difficulties", "3"], "--difficulties is for tasks, and"),
    (["--objectives", "full,denoise model.patch_size=3"], "model.patch_size 3 does not divide images of 8 x 8"),
    (["--objectives", "full,full images.flip=true"], "an arm cannot set images.flip, which all arms share"),
    (["--objectives", "denoise:concat"], "denoise.context"),
    (["--images.heldout", "0.0001"], "digits has one held-out image, but a comparison chooses depths on one half"),
])
def test_what_does_not_apply_is_one_sentence_and_nothing_is_trained(tiny, changed, changes, why, tmp_path, monkeypatch,
                                                                    capsys):
    monkeypatch.chdir(tmp_path)
    assert main(changed([*tiny, "--objectives", "full,denoise"], changes)) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.startswith("looped: ")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- figures made up -------------------------------------------------------------------------------------------------

def run(objective, seed, right, curve):
    """A measured run: `right[depth]` which images are classified correctly; `curve` of (step, accuracy)."""
    config = load_config(None, {"objective": objective, "images.source": "digits", "denoise.context": "inject",
                                "recurrence.mean": 2})
    place = RunSpec(Arm(objective, objective, config, objective), seed, Path(f"{objective}-{seed}"))
    lines = [{"step": step, "accuracy": share, "seconds": step / 2, "tokens": 10 * step, "layer_forwards": 100 * step}
             for step, share in curve]
    costs = {name: lines[-1].get(name, 0) for name in ("step", "tokens", "layer_forwards", "seconds", "peak_bytes")}
    named = {depth: torch.tensor(each, dtype=torch.float64) for depth, each in right.items()}
    return ImageMeasured(place, [], costs, lines, {None: named})


@pytest.fixture
def arms():
    """Loops that end at 0.8 after 40 steps, denoisers that end at 0.4 after 20; two seeds, alike but for one image."""
    loops = [run("full", seed, {2: [1, seed, 1, 1], 8: [0, 1, 0, 1]}, [(10, 0.2), (20, 0.6), (40, 0.8)])
             for seed in range(2)]
    return summarise_shares([*loops, *(run("denoise", seed, {1: [1, 0, 1, 0], 8: [1, 0, 0, 1]}, [(10, 0.1), (20, 0.4)])
                                       for seed in range(2))])


def test_the_best_depth_is_of_one_half_and_figures_of_the_other(arms):
    plan = make_plan(load_config(None), "full,denoise", budget=("seconds", 1), num_seeds=2, depths=[1, 8],
                     out=Path("out"))
    table = share_table(arms, plan)
    header, lines = table.header, table.lines
    assert header[:5] == ["arm", "trained depth", "best depth", "deepest", "against full"]
    assert lines[0][1:4] == ["0.750 ± 0.354 (2)", "0.750 ± 0.354 (2)", "1.000 ± 0.000 (8)"]
    assert lines[1][1:4] == ["0.000 ± 0.000 (1)", "0.000 ± 0.000 (1)", "0.500 ± 0.000 (8)"]
    assert lines[1][4].startswith("-0.750 [")


def test_equal_budgets_and_who_was_there_first_are_of_the_accuracy():
    curves = {"full": [(10, 0.2), (20, 0.6), (40, 0.8)], "denoise": [(10, 0.1), (20, 0.4)]}
    arms = summarise_shares([run(name, seed, {2: [name == "full"] * 16}, curve) for name, curve in curves.items()
                             for seed in range(2)])
    table = equal_table(arms)
    header, lines = table.header, table.lines
    assert header[1:] == ["after 10 seconds", "after 200 tokens", "after 2,000 layer forwards"]
    assert [line[1:] for line in lines] == [["0.600 ± 0.000"] * 3, ["0.400 ± 0.000"] * 3]
    assert [sentence(each) for each in IMAGES.reaches(arms)] == [
        "denoise does not reach full's final accuracy (0.800).",
        "full reaches denoise's final accuracy (0.400) after 0.38 of its own training time, which is 0.75 of denoise's "
        "seconds, 0.75 of denoise's tokens and 0.75 of denoise's layer forwards."]
