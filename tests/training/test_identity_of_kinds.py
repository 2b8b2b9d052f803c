"""A run of problems or images keeps the identity of its data: changed ones are refused, others have to be meant."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from looped.cli import main
from looped.data.from_config import open_data
from looped.errors import UserError
from looped.tasks.prefix_sums import PrefixSums
from looped.training.runs import load_run
from looped.training.train import train


def rows_of(folder):
    return [json.loads(line) for line in (folder / "eval" / "depth.jsonl").read_text().splitlines()]


TASK = {"task.name": "prefix-sums", "task.difficulty": [4, 4], "objective": "full", "training.budget": 1,
        "evaluation.num_problems": 2, "evaluation.difficulties": [4], "evaluation.depths": [1, 3]}


def test_a_task_that_has_changed_is_refused(tiny, tmp_path, capsys, monkeypatch):
    train(tiny(**TASK), tmp_path / "run")
    assert main(["eval", str(tmp_path / "run")]) == 0
    make = PrefixSums.make

    def turned_round(self, rng, difficulty, *, heldout):
        found = make(self, rng, difficulty, heldout=heldout)
        return replace(found, targets=np.where(found.targets < 2, 1 - found.targets, found.targets))

    monkeypatch.setattr(PrefixSums, "make", turned_round)
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "have changed since it was trained on them (task prefix-sums; contents" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "run"), "--other-data"]) == 0
    where, = (tmp_path / "run" / "other").iterdir()
    assert {row["data"].partition(" (")[0] for row in rows_of(where)} == {"task prefix-sums"}
    assert (where / "report.html").exists()


IMAGES = {"images.source": "folder", "model.patch_size": 4, "objective": "full", "training.budget": 1,
          "evaluation.depths": [1]}


@pytest.fixture
def pictures(tmp_path):
    """A folder of two classes; more of them with `pictures(20)`."""
    def draw(num, shade=0):
        for name in ("dark", "light"):
            (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
            for number in range(num):
                Image.new("L", (8, 8), shade + number + 100 * (name == "light")).save(
                    tmp_path / "pictures" / name / f"{number}.png")
        return {"images.path": str(tmp_path / "pictures")}

    return draw


def test_images_that_have_changed_are_refused_and_others_come_to_the_scale_of_the_run(tiny, tmp_path, pictures, capsys):
    train(tiny(**IMAGES | pictures(10)), tmp_path / "run")
    before = load_run(tmp_path / "run").data.images
    assert load_run(tmp_path / "run", settings={"images.max_heldout": 1}).data.images.heldout.batches
    pictures(12, shade=30)
    with pytest.raises(UserError, match="images 20 then, 24 now"):
        _ = load_run(tmp_path / "run").data
    found = load_run(tmp_path / "run", other_data=True)
    assert found.data.images.scale == found.data.images.heldout.scale == before.scale == found.scale
    assert open_data(found.config).images.scale != before.scale  # the control
    assert found.class_names == list(before.class_names)
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    del data["facts"]["means"]
    (tmp_path / "run" / "data.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="has no record of the means and deviations"):
        _ = load_run(tmp_path / "run", other_data=True).data


def test_features_of_a_classifier_of_other_images_must_be_meant(tiny, tmp_path, pictures, capsys):
    maker = {"objective": "denoise", "images.goal": "generate", "images.normalise": "symmetric",
             "model.num_prelude_layers": 0, "model.num_coda_layers": 0, "model.injection": "none",
             "denoise.context": "inject", "denoise.noise": "paper", "denoise.weight": "edm",
             "evaluation.num_samples": 1, "evaluation.num_images": 4, "images.heldout": 0.5}
    same = IMAGES | pictures(10) | {"images.heldout": 0.5}
    train(tiny(**same | maker), tmp_path / "maker")
    train(tiny(**same), tmp_path / "same")  # normalised otherwise, but the same images
    train(tiny(**same | {"images.heldout": 0.4}), tmp_path / "else")
    command = ["eval", str(tmp_path / "maker"), "--depths", "1", "--features"]
    assert main([*command, str(tmp_path / "same")]) == 0
    assert main([*command, str(tmp_path / "else")]) == 2
    assert "was trained on other data" in capsys.readouterr().err
