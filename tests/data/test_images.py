"""The order and the variation of images are functions of (seed, step): any rows are the whole's, on any process."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import random_part, write_mnist
from sklearn.datasets import load_digits

from looped.config.images import ImageConfig
from looped.data.images import ImageBatch, ImageStream, Normalizer, measure, prepare_images, symmetric
from looped.data.images_to_arrays import Pictures
from looped.errors import UserError

PLAIN = ImageConfig(source="digits")
VARIED = ImageConfig(source="digits", flip=True, randaugment=True, randaugment_ops=2, randaugment_magnitude=9)
DIGITS = prepare_images(PLAIN)


def numbered(count, config=PLAIN):
    """A stream whose labels are the images' own numbers."""
    pixels = np.random.default_rng(count).integers(0, 256, (count, 7, 6, 3), dtype=np.uint8)
    return ImageStream(Pictures(pixels, np.arange(count)), symmetric(3), config)


def same(one, other):
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


# ---- order and variation ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [PLAIN, VARIED])
@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 1000), st.integers(0, 2**64), st.data())
@settings(max_examples=25, deadline=None)
def test_rows_of_a_batch_are_the_slice_of_the_whole_batch(config, count, batch_size, step, seed, data):
    stream = numbered(count, config)
    start = data.draw(st.integers(0, batch_size))
    rows = range(start, data.draw(st.integers(start, batch_size)))
    whole = stream.batch(step, batch_size=batch_size, seed=seed)
    assert whole.images.shape == (batch_size, 3, 7, 6)
    assert (whole.images.dtype, whole.labels.dtype) == (torch.float32, torch.int64)
    assert same(stream.batch(step, batch_size=batch_size, seed=seed, rows=rows), whole[rows.start : rows.stop])


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**64))
@settings(max_examples=50, deadline=None)
def test_every_image_is_seen_once_an_epoch_whatever_the_batch_size(count, batch_size, seed):
    stream = numbered(count)
    steps = -(-3 * count // batch_size)
    labels = torch.cat([stream.batch(step, batch_size=batch_size, seed=seed).labels for step in range(steps)])
    for epoch in range(3):
        assert labels[epoch * count : (epoch + 1) * count].sort().values.tolist() == list(range(count))


@pytest.mark.parametrize("config", [PLAIN, VARIED])
def test_a_resumed_run_sees_what_an_undisturbed_one_sees(config):
    late = numbered(50, config).batch(17, batch_size=8, seed=5)
    stream = numbered(50, config)
    for step in range(18):
        again = stream.batch(step, batch_size=8, seed=5)
    assert same(again, late)


def test_seeds_and_epochs_give_other_orders():
    stream = numbered(200)
    orders = {tuple(stream.batch(epoch, batch_size=200, seed=seed).labels.tolist())
              for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_variation_differs_by_item_and_by_seed_and_keeps_the_labels():
    plain, varied = numbered(1), numbered(1, VARIED)  # one image, again and again
    batches = [varied.batch(step, batch_size=20, seed=seed) for step in (0, 1) for seed in (0, 1)]
    kinds = {image.numpy().tobytes() for batch in batches for image in batch.images}
    assert len(kinds) > 50
    assert len({image.numpy().tobytes() for image in plain.batch(0, batch_size=20, seed=0).images}) == 1
    order = numbered(30).batch(2, batch_size=16, seed=3)
    again = numbered(30, VARIED).batch(2, batch_size=16, seed=3)
    assert torch.equal(order.labels, again.labels)
    assert not torch.equal(order.images, again.images)


def test_a_flip_alone_mirrors_about_half_and_changes_nothing_else():
    plain = numbered(400).batch(0, batch_size=400, seed=1).images
    flipped = numbered(400, ImageConfig(source="digits", flip=True)).batch(0, batch_size=400, seed=1).images
    mirrored = [torch.equal(one.flip(-1), other) for one, other in zip(plain, flipped, strict=True)]
    kept = [torch.equal(one, other) for one, other in zip(plain, flipped, strict=True)]
    assert all(one != other for one, other in zip(mirrored, kept, strict=True))
    assert 160 < sum(mirrored) < 240  # four standard deviations


def test_settings_of_randaugment_reach_it():
    def images(**settings):
        return numbered(20, ImageConfig(source="digits", randaugment=True, **settings)).batch(
            0, batch_size=20, seed=0).images
    assert torch.equal(images(), images(randaugment_ops=2, randaugment_magnitude=9))
    assert not torch.equal(images(), images(randaugment_ops=3))
    assert not torch.equal(images(), images(randaugment_magnitude=10))


def test_rows_are_described_by_image_class_and_item():
    lines = DIGITS.train.describe(2, batch_size=4, seed=0, rows=range(1, 3))
    labels = DIGITS.train.batch(2, batch_size=4, seed=0).labels[1:3].tolist()
    assert [line.split(": ")[0] for line in lines] == ["row 1", "row 2"]
    for line, label, item in zip(lines, labels, (9, 10), strict=True):
        place = int(line.split("image ")[1].split()[0])
        assert DIGITS.train.pictures.labels[place] == label
        assert line.endswith(f"(class {label}), item {item} of seed 0")


def test_a_batch_moves_and_is_cut_as_one():
    batch = DIGITS.train.batch(0, batch_size=6, seed=0)
    assert len(batch) == 6
    assert batch.to("meta").images.device.type == batch.to("meta").labels.device.type == "meta"
    part = batch[torch.tensor([4, 1])]
    assert torch.equal(part.images, batch.images[[4, 1]])
    assert torch.equal(part.labels, batch.labels[[4, 1]])
    assert isinstance(part, ImageBatch)


# ---- digits, the split and the scale ---------------------------------------------------------------------------------

def test_digits_are_scikit_learns():
    digits = load_digits()
    train, heldout = DIGITS.train.pictures, DIGITS.heldout.pictures
    assert (len(train), len(heldout)) == (1617, 180)
    ours = Counter((round(255 / 16 * 16), *pixels.ravel().tolist(), label)
                   for part in (train, heldout) for pixels, label in zip(part.pixels, part.labels, strict=True))
    theirs = Counter((255, *[round(255 * level / 16) for level in image.ravel()], label)
                     for image, label in zip(digits.images, digits.target, strict=True))
    assert ours == theirs
    assert (DIGITS.num_classes, DIGITS.class_names) == (10, tuple("0123456789"))
    assert (DIGITS.channels, DIGITS.size) == (1, (8, 8))
    assert DIGITS.summary == "digits: 1,617 training images, 180 held out, 10 classes, 8 x 8 pixels, grey"


def test_the_order_and_the_split_are_the_recorded_ones():
    assert DIGITS.fingerprint == "f6c00ca1f219b89822cbc6f050b9383a"
    assert DIGITS.train.batch(3, batch_size=128, seed=0).labels[:5].tolist() == [2, 5, 5, 5, 9]


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_held_out_images_are_a_share_that_training_never_sees(tmp_path, share):
    images, labels = random_part(97)
    write_mnist(tmp_path, "train", images, labels)
    data = prepare_images(ImageConfig(source="idx", path=str(tmp_path), heldout=share))
    sides = [{pixels.tobytes() for pixels in part.pixels} for part in (data.train.pictures, data.heldout.pictures)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {image.tobytes() for image in images}
    assert len(sides[1]) == min(max(round(97 * share), 1), 96)


def test_the_split_takes_from_all_places_and_does_not_know_the_seed(tmp_path):
    images, _ = random_part(1000)
    places = np.arange(1000) % 256
    write_mnist(tmp_path, "train", images, places)  # so that labels tell where in the file an image was
    data = prepare_images(ImageConfig(source="idx", path=str(tmp_path), heldout=0.5))
    quarters = np.histogram(data.heldout.pictures.labels, bins=4, range=(0, 256))[0]
    assert quarters.min() > 90  # 125 each
    assert data.fingerprint == prepare_images(ImageConfig(source="idx", path=str(tmp_path), heldout=0.5)).fingerprint


def test_some_of_the_images_are_taken_from_all_places(tmp_path):
    images, _ = random_part(1000)
    places = np.arange(1000) % 256
    write_mnist(tmp_path, "train", images, places)
    whole = prepare_images(ImageConfig(source="idx", path=str(tmp_path), heldout=0.5))
    part = prepare_images(ImageConfig(source="idx", path=str(tmp_path), heldout=0.5, max_train=200, max_heldout=50))
    assert (len(part.train), len(part.heldout)) == (200, 50)
    assert part.fingerprint != whole.fingerprint
    assert abs(part.train.pictures.labels.mean() - whole.train.pictures.labels.mean()) < 20
    for some, every in ((part.train, whole.train), (part.heldout, whole.heldout)):
        assert {each.tobytes() for each in some.pictures.pixels} <= {each.tobytes() for each in every.pictures.pixels}
    more = prepare_images(ImageConfig(source="idx", path=str(tmp_path), heldout=0.5, max_train=9000))
    assert more.fingerprint == whole.fingerprint


def test_one_image_cannot_be_split(tmp_path):
    write_mnist(tmp_path, "train", *random_part(1))
    with pytest.raises(UserError, match=r"holds one image, but images\.heldout 0\.1 needs another to hold out"):
        prepare_images(ImageConfig(source="idx", path=str(tmp_path)))


def test_standard_images_have_zero_mean_and_unit_variance_in_training():
    images = torch.cat([DIGITS.train.batch(0, batch_size=len(DIGITS.train), seed=0).images])
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    heldout = DIGITS.heldout[:].images
    assert 1e-4 < abs(heldout.mean().item()) < 0.1  # measured on the training part alone


def test_each_channel_is_measured_by_itself_and_a_constant_one_stays_finite():
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 4, 5, 3), dtype=np.uint8)
    pixels[..., 1] //= 4
    pixels[..., 2] = 200
    scale = measure(Pictures(pixels, np.zeros(3000, dtype=np.int64)))
    exact = pixels.reshape(-1, 3).astype(np.float64) / 255
    assert scale.mean == pytest.approx(exact.mean(0).tolist())
    assert scale.std[:2] == pytest.approx(exact.std(0)[:2].tolist())
    assert scale.std[2] == 1
    assert scale.normalise(pixels)[:, 2].abs().max() < 1e-6


def test_symmetric_images_reach_from_minus_one_to_one():
    data = prepare_images(ImageConfig(source="digits", normalise="symmetric"))
    images = data.train.batch(0, batch_size=200, seed=0).images
    assert (images.min().item(), images.max().item()) == (-1, 1)
    assert (data.mean, data.std) == ((0.5,), (0.5,))
    assert data.fingerprint != DIGITS.fingerprint


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 2)), min_size=1, max_size=3))
@settings(deadline=None)
def test_levels_come_back_from_any_scale_and_are_cut_at_the_ends(channels):
    scale = Normalizer(*(tuple(values) for values in zip(*channels, strict=True)))
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(len(channels), axis=3)
    images = scale.normalise(pixels)
    assert np.array_equal(scale.levels(images).numpy(), pixels)
    assert scale.levels(images + 1e6).min() == 255
    assert scale.levels(images - 1e6).max() == 0


def test_held_out_images_come_in_order_and_whole():
    batches = list(DIGITS.heldout.batches(64))
    assert [len(batch) for batch in batches] == [64, 64, 52]
    whole = DIGITS.heldout[:]
    assert torch.equal(torch.cat([batch.images for batch in batches]), whole.images)
    assert torch.equal(whole.labels, torch.from_numpy(DIGITS.heldout.pictures.labels))
    assert same(DIGITS.heldout[np.array([3, 5])], whole[torch.tensor([3, 5])])


def test_held_out_images_are_never_varied():
    assert same(prepare_images(VARIED).heldout[:], DIGITS.heldout[:])


@pytest.mark.parametrize("change", [{"heldout": 0.2}, {"size": 9}, {"flip": True}, {"randaugment": True},
                                    {"normalise": "symmetric"}])
def test_the_fingerprint_knows_what_changes_the_images(change):
    assert prepare_images(ImageConfig(source="digits", **change)).fingerprint != DIGITS.fingerprint
