"""Images as questions: the row of the class before the patches, in the order of the training images."""

import pytest
import torch

from looped.config.images import ImageConfig
from looped.data.batch import Batch
from looped.data.image_batches import ImageSpec, prepare_labelled
from looped.errors import UserError

PICTURE = ImageSpec(3, 8, 12, 4)


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return prepare_labelled(ImageConfig(source="digits"), 2)


def test_rows_are_the_class_and_the_patches_in_reading_order():
    assert PICTURE.grid == (2, 3)
    assert PICTURE.num_rows == 7
    assert PICTURE.positions().tolist() == [[0, 0], [1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]]


def test_a_batch_asks_for_the_label_of_each_image_in_its_first_row(digits):
    batch = digits.train.batch(3, batch_size=16, seed=1)
    images = digits.images.train.batch(3, batch_size=16, seed=1)
    assert torch.equal(batch.inputs, images.images)
    assert torch.equal(batch.targets[:, 0], images.labels)
    assert batch.scored.tolist() == [[True] + [False] * 16] * 16
    assert batch.positions.shape == (16, 17, 2)
    assert batch.num_tokens == 16 * 17
    assert digits.vocab_size == 10


def test_any_rows_of_a_step_are_those_of_the_whole_step(digits):
    whole = digits.train.batch(2, batch_size=8, seed=0)
    part = digits.train.batch(2, batch_size=8, seed=0, rows=range(3, 6))
    for name, value in vars(whole[3:6]).items():
        same = vars(part)[name]
        assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same
    assert len(digits.train.describe(2, batch_size=8, seed=0, rows=range(3, 6))) == 3


def test_all_held_out_images_are_measured_once(digits):
    batches = list(digits.heldout(64))
    assert all(isinstance(batch, Batch) for batch in batches)
    assert torch.equal(torch.cat([batch.targets[:, 0] for batch in batches]), digits.images.heldout[:].labels)


def test_a_patch_that_does_not_fit_is_named_with_those_that_do():
    with pytest.raises(UserError, match="patch_size 3 does not divide images of 8 x 12; take one of 1, 2, 4"):
        ImageSpec(1, 8, 12, 3)
