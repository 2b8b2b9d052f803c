"""The table of generators trained end to end and in blocks: what is run for it, and one small run of all of it."""

import argparse
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from looped.evaluation.image_distances import frechet_distance

pytest.importorskip("sklearn")

TINY = ["--model.width=16", "--model.num_heads=2", "--model.ffn_width=16", "--model.patch_size=4",
        "--denoise.cond_width=8", "--training.batch_size=8", "--evaluation.depths=[1,2]", "--evaluation.num_images=20"]


@pytest.fixture
def script(load):
    return load("dit_table2")


def arguments(**changes):
    return argparse.Namespace(**{"arms": None, "layer_forwards": None, "seeds": 3, "jobs": 1} | changes)


@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_all_arms_have_the_same_layers_images_and_budget(script, tmp_path, scale):
    chosen = script.SCALES[scale]
    plan = script.plan_of(chosen.arms, chosen, arguments(), {}, tmp_path)
    configs = {arm.name: arm.config for arm in plan.arms}
    assert list(configs) == list(chosen.arms)
    assert len({config.model.num_core_layers for config in configs.values()}) == 1
    assert {sum(config.block_layers) for config in configs.values()} == {configs["twin"].model.num_core_layers}
    assert {config.training.budget_unit for config in configs.values()} == {"layer-forwards"}
    assert configs["twin"].objective == "denoise"
    edges = {name: config.blocks.partition for name, config in configs.items() if config.blocks.num == 3}
    assert edges == {"3-blocks": "mass", "3-blocks-log-uniform": "log-uniform"}
    classifier = script.classifier_config(plan.config, chosen)
    assert classifier.images.goal == "classify"
    assert classifier.images.source == plan.config.images.source
    assert classifier.images.heldout == plan.config.images.heldout


def test_a_figure_stands_under_its_arm(script, tmp_path):
    scale = script.SCALES["cpu"]
    plan = script.plan_of(["twin", "3-blocks"], scale, arguments(seeds=2), {}, tmp_path)
    rows = []
    for number, arm in enumerate(["twin", "3-blocks"], 1):
        for seed in range(2):
            about = {"arm": arm, "seed": seed}
            rows += [about | {"metric": "cost", "step": 100 * number, "seconds": 7.0},
                     about | {"metric": "heldout_loss", "mean": number + 0.5},
                     about | {"metric": "heldout_loss", "mean": 99.0, "by": "block 0"}]
            rows += [about | {"metric": metric, "depth": depth, "mean": number + depth / 100 + seed / 10, "by": "X"}
                     for metric in ("frechet_distance", "precision", "recall") for depth in (4, 8, 16)]
    text = script.report(plan, ["twin", "3-blocks"], rows, "X", 0.25)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    table = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    assert table["twin"]["layers a step"] == "6"
    assert table["3-blocks"] == {
        "arm": "3-blocks", "layers a step": "2", "steps": "200", "seconds": "7", "held-out loss": "2.500 ± 0.000",
        "Fréchet, 4 steps": "2.090 ± 0.071", "Fréchet, 8 steps": "2.130 ± 0.071", "Fréchet, 16 steps": "2.210 ± 0.071",
        "precision": "2.210 ± 0.071", "recall": "2.210 ± 0.071",
        "FID in the paper": script.ARMS["3-blocks"].paper}
    assert "features of X: not Inception FID" in text
    assert "0.250" in text


def test_training_images_are_compared_class_by_class(script):
    """Images of a class are all alike, so of the same shares of classes the distance is nothing."""
    def part(labels):
        labels = np.array(labels)
        return SimpleNamespace(pictures=SimpleNamespace(labels=labels, pixels=labels[:, None] * np.ones((1, 4))))

    features = SimpleNamespace(name="X", of=lambda pixels: pixels)
    images = SimpleNamespace(train=part([0] * 8 + [1] * 4 + [2] * 2), heldout=part([0, 1, 1, 2, 0, 2]))
    run = SimpleNamespace(data=SimpleNamespace(images=images))
    assert script.of_training_images(run, features) == pytest.approx(0, abs=1e-12)
    by_order = torch.from_numpy(images.train.pictures.pixels[:6])
    assert frechet_distance(torch.from_numpy(images.heldout.pictures.pixels), by_order) > 1


@pytest.mark.parametrize(("words", "why"), [
    (["--arms", "twins"], "did you mean 'twin'"), (["--model.widht", "3"], "did you mean 'width'"),
    (["--arms", "4-blocks"], "does not split into blocks.num 4"), (["--second", "3"], "neither an option of this")])
def test_bad_input_is_one_sentence_and_nothing_is_trained(script, tmp_path, monkeypatch, capsys, words, why):
    monkeypatch.setattr(sys, "argv", ["dit_table2", "--out", str(tmp_path / "out"), *words])
    assert script.main() == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_small_run_fills_the_table_and_goes_on(script, tmp_path, monkeypatch, capsys):
    short = {**script.SCALES["cpu"].classifier, "training.budget": 20, "training.num_evals": 0}
    monkeypatch.setitem(script.SCALES, "cpu", replace(script.SCALES["cpu"], classifier=short))
    monkeypatch.setattr(sys, "argv", ["dit_table2", "--out", str(tmp_path), "--arms", "twin,2-blocks", "--seeds", "1",
                                      "--layer-forwards", "2000", *TINY])
    assert script.main() == 0
    text = (tmp_path / "dit_table2.md").read_text()
    assert text.count("nan") == 0
    assert {"twin", "2-blocks"} == {json.loads(line)["arm"] for line in
                                    (tmp_path / "dit_table2.jsonl").read_text().splitlines()}
    capsys.readouterr()
    assert script.main() == 0
    assert "2 of 2 runs are trained already" in capsys.readouterr().out
    assert (tmp_path / "dit_table2.md").read_text() == text
