"""Images out of datasets.load_dataset, from local parquet files: fields, splits, classes, and bad data."""

import numpy as np
import pytest
from picture_files import picture, sentence
from PIL import Image

from looped.config.images import ImageConfig
from looped.data.image_sources import read_source
from looped.data.images import prepare_images

datasets = pytest.importorskip("datasets")


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Writes parquet splits of {field: values} that load_dataset reads without the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def save(features=None, **splits):
        for split, rows in splits.items():
            (tmp_path / "data").mkdir(exist_ok=True)
            table = datasets.Dataset.from_dict(rows, features=features and datasets.Features(features))
            table.to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
        return {"source": "dataset", "dataset": str(tmp_path / "data")}
    return save


def rows(count, *, first=0, shape=(5, 6)):
    return {"image": [Image.fromarray(picture(first + number, *shape)) for number in range(count)],
            "label": [number % 2 for number in range(count)]}


CLASSES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}


def test_a_dataset_has_its_test_split_and_the_names_of_its_classes(saved):
    config = ImageConfig(**saved(CLASSES, train=rows(5), test=rows(3, first=50)))
    source = read_source(config)
    assert source.class_names == ("cat", "dog")
    assert np.array_equal(source.train.pixels[..., 0], [picture(number, 5, 6) for number in range(5)])
    assert np.array_equal(source.test.pixels[..., 0], [picture(50 + number, 5, 6) for number in range(3)])
    assert source.train.labels.tolist() == [0, 1, 0, 1, 0]


def test_a_dataset_without_a_test_split_is_split_here(saved):
    where = saved(CLASSES, train=rows(6), validation=rows(3))
    data = prepare_images(ImageConfig(**where, heldout=0.3))
    assert (len(data.train), len(data.heldout)) == (4, 2)
    assert len(read_source(ImageConfig(**where, test_split="validation")).test) == 3
    assert read_source(ImageConfig(**where, split="train+validation")).test is None


def test_a_test_split_that_is_trained_on_is_not_held_out_too(saved):
    where = saved(CLASSES, train=rows(6), test=rows(3, first=50))
    both = read_source(ImageConfig(**where, split="train+test"))
    assert (len(both.train), both.test) == (9, None)


def test_labels_may_be_words_or_scattered_numbers_under_other_names(saved):
    where = saved(train={"picture": rows(4)["image"], "kind": ["b", "a", "b", "c"], "code": [9, 3, 9, 5]})
    words = read_source(ImageConfig(**where, image_field="picture", label_field="kind"))
    numbers = read_source(ImageConfig(**where, image_field="picture", label_field="code"))
    assert (words.class_names, words.train.labels.tolist()) == (("a", "b", "c"), [1, 0, 1, 2])
    assert (numbers.class_names, numbers.train.labels.tolist()) == (("3", "5", "9"), [2, 0, 2, 1])


@pytest.mark.parametrize(("change", "more", "says"), [
    ({}, {"image_field": "imag"}, "(train) has no field 'imag'; did you mean 'image'?; set images.image_field"),
    ({}, {"label_field": "class"}, "has no field 'class'; known names: image, label; set images.label_field"),
    ({}, {"image_field": "label"}, "row 0: field 'label' holds int, not an image; set images.image_field"),
    ({"label": [0.5, 1.0]}, {}, "row 0: field 'label' holds float, not a class"),
    ({"label": [1, None]}, {}, "row 1: field 'label' holds NoneType, not a class"),
    ({"image": [{"bytes": b"text", "path": None}] * 2}, {}, "row 0 is not an image that Pillow reads (cannot identify"),
    ({}, {"split": "tain"}, "cannot be read (Unknown split \"tain\""),
    ({}, {"dataset_config": "english"}, "'english' not found"),
])
def test_a_dataset_that_cannot_be_used_says_why(saved, change, more, says):
    message = sentence(**saved(train=rows(2) | change), **more)
    assert says in message


def test_labels_that_training_does_not_know_are_refused(saved):
    unlabelled = rows(3) | {"label": [0, -1, 1]}
    assert "(test) row 1 has the label -1, which is none of the 2 training classes" in sentence(
        **saved(CLASSES, train=rows(4), test=unlabelled))
