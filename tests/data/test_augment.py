"""Augmentations do what their names say, at torchvision's strengths, and draw from the generator that is given."""

import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from looped.data import augment
from looped.data.augment import OPERATIONS, apply_operation, mirror, rand_augment
from looped.data.task import rng_of

# Checksums of what torchvision 0.28's RandAugment makes of PICTURE (Pillow 13): magnitude 9 (and its negative), 30
# (and its negative). All magnitudes and five sizes were equal to the last bit when these were written down.
RECORDED = {
    "Identity": [3575222178, 3575222178],
    "ShearX": [958934050, 3794861603, 473648548, 3188370440],
    "ShearY": [655155749, 81907527, 1946837317, 3474944957],
    "TranslateX": [3553121328, 1688261643, 3912198556, 2999201874],
    "TranslateY": [3106300349, 3249695735, 776994554, 3851022805],
    "Rotate": [720745162, 4175511022, 3115807537, 621728427],
    "Brightness": [2732261151, 3705299581, 1632101505, 2595765513],
    "Color": [2698885205, 1238126767, 2460505846, 140910618],
    "Contrast": [4199332608, 142343160, 4176202281, 944526484],
    "Sharpness": [3181670148, 4120684852, 1581083640, 848329552],
    "Posterize": [1244073957, 540580337],
    "Solarize": [3954800807, 4145400703],
    "AutoContrast": [1413362048, 1413362048],
    "Equalize": [3569422921, 3569422921],
}

Y, X, C = np.mgrid[:16, :20, :3]
PICTURE = ((13 * X + 7 * Y * (C + 1) + X * Y) % 256).astype(np.uint8)


def applied(name, pixels, magnitude, *, negative=False):
    """An operation on an array, grey if it has two axes."""
    return np.asarray(apply_operation(name, Image.fromarray(pixels), magnitude, negative=negative))


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_what_torchvision_gives(name):
    signs = (False, True) if OPERATIONS[name].signed else (False,)
    found = [zlib.crc32(applied(name, PICTURE, magnitude, negative=negative).tobytes())
             for magnitude in (9, 30) for negative in signs]
    assert found == RECORDED[name]


def test_there_are_the_fourteen_operations():
    assert list(OPERATIONS) == list(RECORDED)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"Solarize", "AutoContrast", "Equalize"}))
def test_magnitude_zero_leaves_the_image_and_the_full_one_does_not(name, grey):
    pixels = PICTURE[:, :, 0] if grey else PICTURE
    for negative in (False, True):
        assert np.array_equal(applied(name, pixels, 0, negative=negative), pixels)
    nothing = name == "Identity" or (grey and name == "Color")  # grey has no colour to lose
    assert np.array_equal(applied(name, pixels, 30), pixels) == nothing


def test_translations_move_by_whole_pixels_and_fill_with_black():
    for magnitude, by in ((30, 9), (9, 2)):  # 150/331 of 20 is 9.06, three tenths of it 2.7
        assert np.array_equal(applied("TranslateX", PICTURE, magnitude)[:, by:], PICTURE[:, :-by])
        assert not applied("TranslateX", PICTURE, magnitude)[:, :by].any()
        assert np.array_equal(applied("TranslateX", PICTURE, magnitude, negative=True)[:, :-by], PICTURE[:, by:])
    assert np.array_equal(applied("TranslateY", PICTURE, 30)[7:], PICTURE[:-7])  # 7.25 of 16 rows


def test_shears_take_each_row_from_where_the_closed_form_says():
    expected = np.zeros_like(PICTURE)
    for row in range(16):
        for column in range(20):
            source = int(np.floor(column + 0.5 + 0.3 * (row + 0.5)))
            if source < 20:
                expected[row, column] = PICTURE[row, source]
    assert np.array_equal(applied("ShearX", PICTURE, 30), expected)
    turned = np.ascontiguousarray(PICTURE.swapaxes(0, 1))
    assert np.array_equal(applied("ShearY", turned, 30).swapaxes(0, 1), expected)


def test_a_rotated_square_keeps_its_middle_and_its_area():
    square = np.zeros((65, 65), dtype=np.uint8)
    square[16:49, 16:49] = 255
    by_30, by_minus_30 = applied("Rotate", square, 30), applied("Rotate", square, 30, negative=True)
    rows, columns = np.nonzero(by_30)
    assert (rows.mean(), columns.mean()) == pytest.approx((32, 32), abs=0.1)
    assert len(rows) == pytest.approx(33**2, rel=0.02)
    corner = 32 + 16.5 * (np.sin(np.pi / 6) + np.cos(np.pi / 6))  # of a square turned by 30 degrees
    assert rows.max() == pytest.approx(corner, abs=1)
    assert np.array_equal(by_30[:, ::-1], by_minus_30)
    assert not np.array_equal(by_30, by_minus_30)
    # A point right of the middle goes up: counter-clockwise, as seen.
    point = np.zeros((65, 65), dtype=np.uint8)
    point[30:35, 50:55] = 255
    assert np.nonzero(applied("Rotate", point, 30))[0].mean() == pytest.approx(32 - 20 * np.sin(np.pi / 6), abs=1)


def test_levels_change_by_their_closed_forms():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(applied("Posterize", levels, 30), levels & 0b1111_0000)
    assert np.array_equal(applied("Posterize", levels, 9), levels & 0b1111_1110)
    assert np.array_equal(applied("Solarize", levels, 30), 255 - levels)
    assert np.array_equal(applied("Solarize", levels, 10), np.where(levels < 170, levels, 255 - levels))
    assert np.array_equal(applied("Solarize", levels, 0), np.where(levels < 255, levels, 0))
    brighter = applied("Brightness", levels, 10).astype(int)
    assert np.abs(brighter - np.minimum(levels * 1.3, 255)).max() <= 1  # cut, not rounded
    assert np.abs(applied("AutoContrast", levels // 2, 9) - (levels // 2) * (255 / 127)).max() <= 1
    assert np.array_equal(applied("Equalize", levels, 9), levels)  # even already


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]), st.integers(0, 2**32))
def test_mirroring_twice_is_nothing_and_half_are_mirrored(height, width, channels, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    once = mirror(pixels, np.random.default_rng(seed))
    assert np.array_equal(mirror(once, np.random.default_rng(seed)), pixels)
    assert np.array_equal(once, pixels) or np.array_equal(once, pixels[:, ::-1])


def test_about_half_are_mirrored():
    mirrored = sum(not np.array_equal(mirror(PICTURE, rng_of("mirror", number)), PICTURE) for number in range(1000))
    assert 440 < mirrored < 560  # four standard deviations of a fair coin are 63


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3]), st.integers(0, 30), st.integers(0, 2**32))
def test_any_image_keeps_its_shape_and_the_input_its_pixels(height, width, channels, magnitude, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    before = pixels.copy()
    for number in range(6):
        varied = rand_augment(pixels, rng_of(seed, number), num_ops=3, magnitude=magnitude)
        assert (varied.shape, varied.dtype) == (pixels.shape, np.uint8)
    assert np.array_equal(pixels, before)


def test_operations_and_signs_are_drawn_evenly_from_the_generator_given(monkeypatch):
    drawn = Counter()

    def record(name, image, magnitude, *, negative):
        drawn[name, negative] += 1
        return image
    monkeypatch.setattr(augment, "apply_operation", record)
    for number in range(1400):
        rand_augment(PICTURE, rng_of("operations", number), num_ops=4, magnitude=9)
    assert len(drawn) == 28
    assert sum(drawn.values()) == 5600
    assert 140 < min(drawn.values()) <= max(drawn.values()) < 260  # 200 each, +- four standard deviations


def test_the_same_draws_give_the_same_image_and_others_another():
    images = [rand_augment(PICTURE, rng_of(seed), num_ops=2, magnitude=9).tobytes() for seed in (0, 0, *range(20))]
    assert images[0] == images[1] == images[2]
    assert len(set(images)) > 12
