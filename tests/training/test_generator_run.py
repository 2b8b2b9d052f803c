"""A run that makes images: trained in one block or in several, resumed bit for bit, sampled and measured by the command
line; what it refuses."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from looped.cli import main
from looped.config import load_config
from looped.data.image_batches import ImageSpec
from looped.data.images import Normalizer
from looped.errors import UserError
from looped.evaluation.image_features import classifier_features, pixel_features
from looped.evaluation.image_samples import make_images, tile
from looped.inference.rollout import rollout_of
from looped.training.runs import load_run
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

pytest.importorskip("sklearn")

CONFIG = Path(__file__).parents[2] / "configs/digits-generate.yaml"
COMMON = {"images.source": "digits", "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 2,
          "model.num_prelude_layers": 0, "model.num_coda_layers": 0, "model.patch_size": 4,
          "denoise.context": "inject", "denoise.cond_width": 8, "training.batch_size": 16, "training.budget": 6,
          "training.log_every": 3, "training.checkpoint_every": 3, "training.threads": 1, "evaluation.depths": [1, 3],
          "evaluation.sample_depths": [2], "evaluation.num_samples": 3, "training.sample_every": 3}
TINY = COMMON | {"images.goal": "generate", "model.injection": "none", "denoise.noise": "paper",
                 "denoise.weight": "edm", "denoise.solver": "heun", "denoise.schedule": "karras"}
RULES = {"twin": {"objective": "denoise"},
         "blocks": {"objective": "blockwise", "blocks.num": 2, "optim.ema_decay": 0.9, "training.accumulation": 2},
         "bf16": {"objective": "denoise", "training.precision": "bf16"}}


def lines(run, kind):
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["kind"] == kind]


@pytest.mark.parametrize("rule", RULES)
def test_a_run_goes_on_bit_for_bit_and_keeps_pictures(rule, tmp_path):
    config = load_config(None, TINY | RULES[rule])
    whole = train(config, tmp_path / "whole").objective
    assert "loss" in lines(tmp_path / "whole", "heldout")[-1]
    assert lines(tmp_path / "whole", "train")[-1]["tokens"] == 6 * 16 * 4
    for step in (3, 6):  # ten rows of three images of 8 x 8, two pixels apart, enlarged
        picture = np.asarray(Image.open(tmp_path / f"whole/samples/step-{step:08d}.png"))
        assert picture.shape == (98 * 19, 28 * 19)

    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return ""

    assert train(config, tmp_path / "half", sample=stop).step == 4
    assert train(config, tmp_path / "half").step == 6
    run = load_run(tmp_path / "half", ema=False)
    for name, value in whole.state_dict().items():
        assert torch.equal(run.objective.state_dict()[name], value)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A generator of two blocks, and a classifier of the same images."""
    folder = tmp_path_factory.mktemp("runs")
    train(load_config(None, TINY | RULES["blocks"] | {"training.sample_every": 0}), folder / "maker")
    train(load_config(None, COMMON | {"objective": "full", "recurrence.mean": 2, "model.state_init": "zero",
                                     "training.sample_every": 0}),
          folder / "namer")
    return folder


def test_generate_writes_a_row_a_class(runs, tmp_path, capsys):
    out = tmp_path / "sub/grid.png"
    command = ["generate", str(runs / "maker"), "--depth", "3", "--num-samples", "2", "--out", str(out)]
    assert main(command) == 0
    assert "one row each of 0, 1, 2" in capsys.readouterr().out
    plain = np.asarray(Image.open(out))
    assert plain.shape == (98 * 29, 18 * 29)
    assert main([*command, "--guidance", "1"]) == 0
    assert np.array_equal(np.asarray(Image.open(out)), plain)
    assert main([*command, "--guidance", "3000"]) == 0
    assert not np.array_equal(np.asarray(Image.open(out)), plain)
    assert "10 layer forwards per image" in capsys.readouterr().out  # Heun: five readings of one layer, twice


def test_an_image_is_the_same_in_any_batch_and_layers_are_those_of_the_owners(runs):
    run = load_run(runs / "maker")
    labels = torch.arange(7)
    wide, narrow = (make_images(run.objective, labels, 3, batch_size=size) for size in (7, 2))
    torch.testing.assert_close(wide, narrow)
    twin = load_config(None, TINY | RULES["twin"])
    from looped.models.build import build
    from looped.objectives import build_objective
    whole = build_objective(twin, build(twin, 10, run.objective.model.picture))
    ours, theirs = (rollout_of(each).image_cost(4).layer_forwards for each in (run.objective, whole))
    assert theirs == 2 * ours == 14


def test_eval_measures_the_loss_and_the_distance_in_named_features(runs, capsys):
    assert main(["eval", str(runs / "maker"), "--features", str(runs / "namer")]) == 0
    said = capsys.readouterr().out
    assert f"in features of {runs / 'namer'}: not Inception FID" in said
    rows = [json.loads(line) for line in (runs / "maker/eval/depth.jsonl").read_text().splitlines()]
    by_depth = [row for row in rows if "depth" in row]
    assert [(row["metric"], row["depth"]) for row in by_depth] == [
        (metric, depth) for depth in (1, 3) for metric in ("frechet_distance", "precision", "recall")]
    assert {row["by"] for row in by_depth} == {str(runs / "namer")}
    assert [row["layer_forwards"] for row in by_depth][::3] == [1, 5]
    levels = [row for row in rows if row["metric"] == "loss_at_sigma"]
    assert [row["by"] for row in levels] == sorted(row["by"] for row in levels)  # from the highest level down
    assert {row["by"] for row in levels} == {"block 0", "block 1"}
    assert (runs / "maker/plots/sigma.png").exists()
    assert main(["eval", str(runs / "maker"), "--depths", "1", "--json"]) == 0
    assert {row.get("by") for row in map(json.loads, capsys.readouterr().out.splitlines()) if "depth" in row} == {
        "pixels"}
    assert main(["info", str(runs / "maker")]) == 0
    assert "of which a solver step runs one" in capsys.readouterr().out


def test_features_of_a_classifier_are_what_its_head_reads(runs):
    run = load_run(runs / "namer")
    levels = torch.from_numpy(run.data.images.heldout.pictures.pixels[:5])
    features = classifier_features("namer", run.objective, run.config, run.data.images.scale, run.data.picture)
    from looped.inference.rollout import answer
    batch = next(iter(run.data.heldout(5)))
    named = (features.of(levels) @ run.objective.model.head_weight.T).argmax(1)
    expected = answer(run.objective, batch, [run.config.main_depth], run.config)
    assert torch.equal(named, expected[run.config.main_depth].answers[:, 0])
    assert torch.equal(pixel_features().of(levels)[0], levels[0].flatten() / 255)


def test_blocks_that_were_trained_alone_make_images_together(tmp_path, capsys):
    alone = TINY | {"objective": "blockwise", "blocks.num": 2, "blocks.shared": "with-block", "blocks.shared_by": 0,
                    "training.sample_every": 0}
    train(load_config(None, alone | {"blocks.alone": 0}), tmp_path / "b0")
    train(load_config(None, alone | {"blocks.alone": 1, "blocks.shared_from": str(tmp_path / "b0")}), tmp_path / "b1")
    assert main(["merge", str(tmp_path / "b1"), str(tmp_path / "b0"), "--out", str(tmp_path / "whole")]) == 0
    grid = ["--depth", "2", "--out", str(tmp_path / "grid.png")]
    assert main(["generate", str(tmp_path / "whole"), *grid]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "b1"), *grid]) == 2
    assert "only the whole model makes images" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "b1")]) == 0
    assert "held-out loss of this block" in capsys.readouterr().out


def test_tiles_stand_where_they_belong():
    pixels = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 300, 300, 1), dtype=np.uint8)
    sheet = tile(pixels, 2)
    assert sheet.shape == (3 * 302 - 2, 602, 1)
    assert [sheet[y, x, 0] for y in (0, 302, 604) for x in (0, 302)] == [1, 2, 3, 4, 5, 255]
    assert (sheet[300:302] == 255).all()


def test_the_true_deviation_is_measured_where_pixels_are_not_normalised():
    from looped.config.images import ImageConfig
    from looped.data.image_batches import prepare_labelled

    for normalise in ("standard", "symmetric"):
        data = prepare_labelled(ImageConfig(source="digits", normalise=normalise), 2)
        images = data.train.batch(0, batch_size=len(data.images.train), seed=0).inputs
        assert data.picture.deviation == pytest.approx(images.double().std(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize(("command", "why"), [
    (["generate", "maker", "--prompt", "x"], "--prompt is for text, and"),
    (["generate", "maker", "--top-k", "3"], "--top-k is for text, and"),
    (["generate", "maker", "--guidance", "-1"], "--guidance -1.0 is negative"),
    (["generate", "namer", "--out", "x.png"], "classifies images and writes no text"),
    (["generate", "maker", "--out", "x.nonsense"], "cannot write x.nonsense"),
    (["bench", "flops", "--config", str(CONFIG)], "bench flops times truncated steps"),
    (["eval", "maker", "--probes"], "--probes is for text, and"),
    (["eval", "namer", "--features", "maker"], "--features is for runs that make images"),
    (["eval", "maker", "--features", "maker"], "maker is no image classifier"),
    (["eval", "maker", "--evaluation.num_images", "2"], "2 generated images are too few")])
def test_what_does_not_apply_is_refused_in_a_sentence(command, why, runs, capsys):
    words = [str(runs / word) if word in ("maker", "namer") else word for word in command]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1


def test_a_classifier_of_other_sizes_and_guidance_without_hidden_classes_are_refused(runs):
    run = load_run(runs / "namer")
    with pytest.raises(UserError, match="takes images of 8 x 8 pixels in 1 channels, and these are 16 x 8 in 3"):
        classifier_features("namer", run.objective, run.config, Normalizer((0.5,), (0.5,)), ImageSpec(3, 16, 8, 4))
    maker = load_run(runs / "maker").objective
    maker.label_dropout = 0.0
    with pytest.raises(UserError, match=r"images.label_dropout 0; use 1"):
        make_images(maker, torch.arange(2), 1, guidance=2.0)


def test_an_optimiser_step_can_be_timed():
    from looped.cost.arm_timing import Stepper

    stepper = Stepper(load_config(None, TINY | RULES["blocks"]))
    assert stepper.step()["seconds"] > 0
    assert stepper.figures(0)["saved_activation_bytes"] > 0
