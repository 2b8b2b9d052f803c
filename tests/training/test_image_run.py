"""A run on images: trained, resumed bit for bit, read back, measured by the command line; what it refuses."""

import json
import os
import signal

import pytest
import torch

from looped.cli import main
from looped.config import load_config
from looped.errors import UserError
from looped.training.runs import load_run
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

pytest.importorskip("sklearn")

TINY = {"images.source": "digits", "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1,
        "model.num_prelude_layers": 0, "model.num_coda_layers": 0, "model.patch_size": 4, "denoise.context": "inject",
        "denoise.cond_width": 8, "recurrence.mean": 2, "training.batch_size": 16, "training.budget": 6,
        "training.log_every": 3, "training.checkpoint_every": 3, "training.threads": 1, "evaluation.depths": [1, 2],
        "evaluation.sample_depths": [1], "evaluation.num_samples": 3, "training.sample_every": 3,
        "evaluation.batch_size": 64}


def lines(run, kind):
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["kind"] == kind]


RULES = {"denoise": {}, "full": {}, "truncated": {}, "progressive": {}, "one-step": {}, "fixed-point": {}, "ar": {},
         "blockwise": {"blocks.num": 2, "model.num_core_layers": 2},
         "noprop-dt": {"blocks.num": 2, "model.num_core_layers": 2}, "noprop-ct": {}, "noprop-fm": {},
         "forward-forward": {"model.num_core_layers": 2, "model.injection": "none"}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(objective)`: (what training gives back, the folder of the run), once for all tests."""
    folder, done = tmp_path_factory.mktemp("trained"), {}

    def once(objective):
        if objective not in done:
            config = load_config(None, TINY | RULES[objective] | {"objective": objective})
            done[objective] = train(config, folder / objective), folder / objective
        return done[objective]

    return once


@pytest.mark.parametrize("objective", RULES)
def test_any_rule_trains_a_classifier(objective, trained):
    result, run = trained(objective)
    found = lines(run, "heldout")[-1]
    assert {"accuracy", "best_depth", "accuracy_at_1"} <= found.keys()
    assert 0 <= found["accuracy"] <= 1
    assert lines(run, "train")[-1]["tokens"] == 6 * 16 * 5  # four patches and the row of the class
    assert result.step == 6
    assert " taken for " in (run / "train.log").read_text()


@pytest.mark.parametrize("objective", ["denoise", "noprop-dt", "noprop-ct", "forward-forward"])
def test_a_run_goes_on_bit_for_bit_and_is_read_back(objective, trained, tmp_path):
    config = load_config(None, TINY | RULES[objective] | {"objective": objective})
    whole = trained(objective)[0].objective

    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return ""

    assert train(config, tmp_path / "half", sample=stop).step == 4  # asked to stop after step 3, it finishes one more
    assert train(config, tmp_path / "half").step == 6
    run = load_run(tmp_path / "half")
    for name, value in whole.state_dict().items():
        assert torch.equal(run.objective.state_dict()[name], value)
    assert run.objective.model.picture.grid == (2, 2)


@pytest.mark.parametrize("objective", ["denoise", "noprop-dt"])
def test_eval_and_info_know_images(objective, trained, capsys):
    run = trained(objective)[1]
    capsys.readouterr()
    assert main(["eval", str(run), "--depths", "1,3"]) == 0
    said = capsys.readouterr().out
    assert "accuracy" in said
    assert (run / "plots/depth.png").stat().st_size > 1000
    rows = [json.loads(line) for line in (run / "eval/depth.jsonl").read_text().splitlines()]
    assert [(row["metric"], row["depth"], row["n"]) for row in rows] == [("accuracy", 1, 180), ("accuracy", 3, 180)]
    assert main(["info", str(run / "config.yaml")]) == 0
    assert "parameters" in capsys.readouterr().out


def test_a_run_is_measured_on_more_or_fewer_of_the_images_held_out(tmp_path, capsys):
    train(load_config(None, TINY | {"images.max_heldout": 50}), tmp_path / "run")
    counts = []
    for most in ([], ["--images.max_heldout", "20"], ["--images.max_heldout", "null"]):
        assert main(["eval", str(tmp_path / "run"), "--depths", "1", *most]) == 0
        counts.append(json.loads((tmp_path / "run/eval/depth.jsonl").read_text().splitlines()[-1])["n"])
    assert counts == [50, 20, 180]  # each beside those before it
    assert main(["eval", str(tmp_path / "run"), "--images.max_train", "20"]) == 2
    assert "--images.max_train was fixed when" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "why"), [
    (["generate", "RUN"], "classifies images and writes no text"),
    (["eval", "RUN", "--probes"], "--probes is for text, and"),
    (["eval", "RUN", "--exits", "kl"], "--exits is for tasks and text, and")])
def test_what_is_for_text_or_tasks_is_refused_in_a_sentence(command, why, trained, capsys):
    run = str(trained("denoise")[1])
    capsys.readouterr()
    assert main([word.replace("RUN", run) for word in command]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("flags", "why"), [
    ({"task.name": "copy"}, "task.name copy and images.source digits are both set"),
    ({"denoise.context": "context"}, "in an image all rows attend to each other; set denoise.context to inject"),
    ({"denoise.order": "confidence"}, "it needs task.name")])
def test_settings_that_do_not_go_with_images_are_refused(flags, why):
    with pytest.raises(UserError, match=why):
        load_config(None, TINY | flags)


def test_patches_that_do_not_fit_are_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="patch_size 3 does not divide images of 8 x 8; take one of 1, 2, 4, 8"):
        train(load_config(None, TINY | {"model.patch_size": 3}), tmp_path / "run")


def test_an_optimiser_step_on_images_can_be_timed():
    from looped.cost.arm_timing import Stepper

    stepper = Stepper(load_config(None, TINY))
    assert stepper.step()["seconds"] > 0
    assert stepper.figures(0)["saved_activation_bytes"] > 0
