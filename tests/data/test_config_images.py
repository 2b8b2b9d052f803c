"""Settings of image data: contradictions are refused in one sentence, and reading them loads no torch."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from looped.config.images import POINTERS, READS, ImageConfig

GOOD = {
    "no images": {},
    "digits": {"source": "digits"},
    "idx": {"source": "idx", "path": "mnist"},
    "folder": {"source": "folder", "path": "pets", "size": 64},
    "dataset": {"source": "dataset", "dataset": "cifar10", "dataset_config": "plain_text", "test_split": "test"},
}

BAD = {
    "no path": ({"source": "idx"}, "source idx needs the folder of the IDX files; set images.path"),
    "no folder": ({"source": "folder"}, "source folder needs the folder of the class folders; set images.path"),
    "no dataset": ({"source": "dataset"}, "source dataset needs a name for .*; set images.dataset"),
    "a path that nothing reads": (
        {"source": "digits", "path": "a"},
        "path a is set, which source digits does not read; set images.source to idx or folder, or images.path to null"),
    "a dataset beside a path": ({"source": "idx", "path": "a", "dataset": "b"}, "dataset b is set, which source idx"),
    "a test split of a folder": ({"source": "folder", "path": "a", "test_split": "b"}, "test_split b is set, which"),
    "one split for both": ({"source": "dataset", "dataset": "a", "test_split": "train"}, "is also the split trained"),
    "a path alone": ({"path": "a"}, "path a is set, which nothing reads without images.source; set images.source to"),
    "an unknown source": ({"source": "mnist"}, "'digits', 'idx', 'folder' or 'dataset'"),
    "an unknown name": ({"pth": "a"}, "Extra inputs"),
    "nothing held out": ({"source": "digits", "heldout": 0}, "greater than 0"),
    "all held out": ({"source": "digits", "heldout": 1}, "less than 1"),
    "a magnitude off the scale": ({"source": "digits", "randaugment_magnitude": 31}, "less than or equal to 30"),
    "no size": ({"source": "digits", "size": 0}, "greater than or equal to 1"),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_belongs_together_is_accepted_and_survives_a_dump(case):
    config = ImageConfig(**GOOD[case])
    assert ImageConfig(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize("case", BAD)
def test_what_contradicts_itself_is_refused_in_one_sentence(case):
    settings, says = BAD[case]
    with pytest.raises(ValidationError, match=says) as caught:
        ImageConfig(**settings)
    (problem,) = caught.value.errors()
    assert "\n" not in problem["msg"]


def test_every_source_and_every_pointer_has_a_rule():
    names = ImageConfig.model_fields
    assert set(READS) == {"digits", "idx", "folder", "dataset"}
    assert {name for reads in READS.values() for name in reads} == set(POINTERS)
    assert set(POINTERS) <= {name for name, field in names.items() if field.default is None} - {"source", "size"}


def test_every_setting_is_described():
    assert all(field.description for field in ImageConfig.model_fields.values())


def test_reading_the_settings_loads_no_torch():
    code = "import sys, looped.config.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
