"""Readers of images against other readers and writers; whatever is wrong with a file ends in one sentence."""

import builtins
import gzip
import shutil
import struct
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from picture_files import idx_bytes, picture, random_part, sentence, write_mnist, write_picture
from PIL import Image

from looped.config.images import ImageConfig
from looped.data.idx import read_idx
from looped.data.image_sources import read_source
from looped.data.images import prepare_images
from looped.data.images_to_arrays import COLOUR, GREY, gather, squared
from looped.errors import UserError

# ---- IDX -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_are_read_as_struct_wrote_them(tmp_path, compress):
    train, test = random_part(9), random_part(4, seed=1, classes=2)
    write_mnist(tmp_path, "train", *train, compress=compress)
    write_mnist(tmp_path, "t10k", *test, compress=compress)
    source = read_source(ImageConfig(source="idx", path=str(tmp_path)))
    for part, (images, labels) in ((source.train, train), (source.test, test)):
        assert np.array_equal(part.pixels[..., 0], images)
        assert np.array_equal(part.labels, labels)
    assert source.class_names == ("0", "1", "2", "3")
    data = prepare_images(ImageConfig(source="idx", path=str(tmp_path)))
    assert (len(data.train), len(data.heldout), data.size) == (9, 4, (5, 6))


def test_gzip_is_told_by_its_first_bytes_too(tmp_path):
    array = random_part(3)[0]
    (tmp_path / "plain-name").write_bytes(gzip.compress(idx_bytes(array)))
    assert np.array_equal(read_idx(tmp_path / "plain-name", axes=3), array)


GOOD = idx_bytes(random_part(3)[0])
BAD_IDX = {
    # bytes, what the message must say
    "empty": (b"", "begins with nothing, but an IDX file of bytes with 3 axes begins with 00 00 08 03; check"),
    "another type": (idx_bytes(random_part(3)[0], kind=0x0D), "begins with 00 00 0d 03, but"),
    "labels for images": (idx_bytes(np.zeros(3)), "begins with 00 00 08 01, but"),
    "a picture": (b"\x89PNG\r\n", "begins with 89 50 4e 47, but"),
    "little-endian": (struct.pack("<4B3I", 0, 0, 8, 3, 3, 5, 6) + bytes(90), "is cut short: 50331648 x 83886080 x"),
    "cut in the header": (GOOD[:10], "is cut short: the header alone takes 16, but it has 10; fetch it again"),
    "cut in the images": (GOOD[:-1], "is cut short: 3 x 5 x 6 bytes and a header make 106, but it has 105; fetch"),
    "too long": (GOOD + b"x", "is too long: 3 x 5 x 6 bytes and a header make 106, but it has 107"),
    "cut gzip": (gzip.compress(GOOD)[:-9], "is damaged (Compressed file ended before"),
    "no images": (idx_bytes(np.zeros((0, 5, 6))), "holds 0 images and"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_a_bad_idx_file_is_named_with_what_is_wrong(tmp_path, case):
    raw, says = BAD_IDX[case]
    write_mnist(tmp_path, "train", *random_part(3))
    assert len(read_source(ImageConfig(source="idx", path=str(tmp_path))).train) == 3  # it is the bytes that are bad
    (tmp_path / "train-images-idx3-ubyte").write_bytes(raw)
    message = sentence(source="idx", path=str(tmp_path))
    assert says in message
    assert "train-images-idx3-ubyte" in message


def test_a_gz_name_without_gzip_inside_is_damaged(tmp_path):
    write_mnist(tmp_path, "train", *random_part(3), compress=True)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(GOOD)
    assert "is damaged (Not a gzipped file" in sentence(source="idx", path=str(tmp_path))


@pytest.mark.parametrize(("part", "kind"), [("train", "images-idx3"), ("train", "labels-idx1"), ("t10k", "images-idx3"),
                                            ("t10k", "labels-idx1")])
def test_a_missing_one_of_two_files_is_named(tmp_path, part, kind):
    for name in ("train", "t10k"):
        write_mnist(tmp_path, name, *random_part(3))
    (tmp_path / f"{part}-{kind}-ubyte").unlink()
    assert f"has no {part}-{kind}-ubyte (nor .gz); put it there" in sentence(source="idx", path=str(tmp_path))


def test_counts_that_disagree_and_empty_files_are_refused(tmp_path):
    images, labels = random_part(3)
    write_mnist(tmp_path, "train", images, labels[:2])
    assert "holds 3 images and" in sentence(source="idx", path=str(tmp_path))
    write_mnist(tmp_path, "train", images[:0], labels[:0])
    assert "holds no image (shape 0 x 5 x 6)" in sentence(source="idx", path=str(tmp_path))


@pytest.mark.parametrize("source", ["idx", "folder"])
def test_a_path_that_is_no_folder_is_refused(tmp_path, source):
    (tmp_path / "file").write_text("")
    assert "does not exist; name the folder" in sentence(source=source, path=str(tmp_path / "none"))
    assert "is a file, not a folder" in sentence(source=source, path=str(tmp_path / "file"))


@given(st.binary(max_size=60) | st.builds(lambda head, tail: GOOD[: 16 - len(head)] + head + tail,
                                          st.binary(max_size=16), st.binary(max_size=100)), st.booleans())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_an_array_or_a_user_error(tmp_path, raw, compress):
    (tmp_path / "any").write_bytes(gzip.compress(raw) if compress else raw)
    try:
        back = idx_bytes(read_idx(tmp_path / "any", axes=3))
    except UserError as error:
        back = str(error)
    assert back == raw or (isinstance(back, str) and "\n" not in back)


# ---- folders ---------------------------------------------------------------------------------------------------------

def test_folders_are_classes_in_the_order_of_their_names(tmp_path):
    pictures = {f"{name}/{'deep/' * (name == 'cat')}{number}.png": picture(number, 5, 6)
                for name in ("dog", "cat") for number in range(3)}
    for name, pixels in pictures.items():
        write_picture(tmp_path / name, pixels)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    source = read_source(ImageConfig(source="folder", path=str(tmp_path)))
    assert (source.class_names, source.test) == (("cat", "dog"), None)
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(source.train.pixels[..., 0], [pictures[name] for name in sorted(pictures)])


def test_train_and_test_folders_are_the_two_parts(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        for name in ("a", "b")[: count - 1 or 1]:
            for number in range(count):
                write_picture(tmp_path / part / name / f"{number}.png", picture(number, 5, 5, 3))
    data = prepare_images(ImageConfig(source="folder", path=str(tmp_path)))
    assert (len(data.train), len(data.heldout), data.channels, data.num_classes) == (6, 2, 3, 2)
    write_picture(tmp_path / "test" / "aa" / "0.png", picture(0, 5, 5, 3))
    assert "is a class that" in sentence(source="folder", path=str(tmp_path))


def test_one_colour_image_makes_all_three_channels_and_grey_ones_stay_equal_in_them(tmp_path):
    write_picture(tmp_path / "train" / "a" / "0.png", picture(0, 5, 5))
    write_picture(tmp_path / "test" / "a" / "0.png", picture(1, 5, 5))
    grey = prepare_images(ImageConfig(source="folder", path=str(tmp_path)))
    assert grey.channels == 1
    write_picture(tmp_path / "test" / "a" / "1.png", picture(2, 5, 5, 3))
    data = prepare_images(ImageConfig(source="folder", path=str(tmp_path)))
    assert data.channels == 3
    assert np.array_equal(data.train.pictures.pixels, grey.train.pictures.pixels.repeat(3, axis=3))
    assert np.array_equal(data.heldout.pictures.pixels[0], picture(1, 5, 5)[..., None].repeat(3, axis=2))
    assert np.array_equal(data.heldout.pictures.pixels[1], picture(2, 5, 5, 3))


def test_links_to_folders_of_images_are_followed_and_hidden_copies_are_not_read(tmp_path):
    write_picture(tmp_path / "far" / "0.png", picture(0, 5, 5))
    write_picture(tmp_path / "set" / "a" / "1.png", picture(1, 5, 5))
    write_picture(tmp_path / "set" / "a" / ".ipynb_checkpoints" / "1-checkpoint.png", picture(1, 5, 5))
    (tmp_path / "set" / "a" / "more").symlink_to(tmp_path / "far")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "far")
    with pytest.warns(UserWarning, match="skipped 1 hidden"):
        source = read_source(ImageConfig(source="folder", path=str(tmp_path / "set")))
    assert source.train.labels.tolist() == [0, 0, 1]
    assert np.array_equal(source.train.pixels[..., 0], [picture(1, 5, 5), picture(0, 5, 5), picture(0, 5, 5)])


def test_what_is_passed_over_beside_images_is_named(tmp_path):
    for name in ("train/a/0.png", "test/a/0.png", "val/a/0.png", "train/1.png", "2.png"):
        write_picture(tmp_path / name, picture(0, 5, 5))
    (tmp_path / "train" / "a" / "3.heic").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped ") as notices:
        read_source(ImageConfig(source="folder", path=str(tmp_path)))
    (message,) = [str(notice.message) for notice in notices]
    for what in ("1 val/ next to train/", "2 in no class folder", "1 .heic", "images are files of .png, .jpg"):
        assert what in message
    shutil.rmtree(tmp_path / "val")
    for name in ("2.png", "train/1.png", "train/a/3.heic"):
        (tmp_path / name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_source(ImageConfig(source="folder", path=str(tmp_path)))


def test_unequal_sizes_are_refused_until_a_size_is_set(tmp_path):
    write_picture(tmp_path / "a" / "0.png", picture(0, 5, 5))
    write_picture(tmp_path / "a" / "1.png", picture(1, 4, 6))
    message = sentence(source="folder", path=str(tmp_path))
    assert "1.png is 4 x 6 pixels (height x width), but" in message
    assert "0.png is 5 x 5; set images.size" in message
    assert read_source(ImageConfig(source="folder", path=str(tmp_path), size=4)).train.pixels.shape == (2, 4, 4, 1)


def test_parts_of_unequal_sizes_are_refused(tmp_path):
    write_mnist(tmp_path, "train", *random_part(3))
    write_mnist(tmp_path, "t10k", *random_part(3, height=7))
    assert "training images are 5 x 6 pixels (height x width) and test images 7 x 6" in sentence(
        source="idx", path=str(tmp_path))
    assert read_source(ImageConfig(source="idx", path=str(tmp_path), size=8)).test.pixels.shape == (3, 8, 8, 1)


@pytest.mark.parametrize("raw", [b"", b"text", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_broken_image_is_named(tmp_path, raw):
    write_picture(tmp_path / "a" / "0.png", picture(0, 5, 5))
    (tmp_path / "a" / "1.png").write_bytes(raw)
    message = sentence(source="folder", path=str(tmp_path))
    assert f"{tmp_path / 'a' / '1.png'} is not an image that Pillow reads (" in message


def test_a_cut_image_is_named(tmp_path):
    write_picture(tmp_path / "a" / "0.jpg", picture(0, 40, 40, 3))
    raw = (tmp_path / "a" / "0.jpg").read_bytes()
    (tmp_path / "a" / "0.jpg").write_bytes(raw[: len(raw) // 2])
    assert "0.jpg is not an image that Pillow reads (image file is truncated" in sentence(
        source="folder", path=str(tmp_path))


def test_deep_levels_are_refused_rather_than_cut(tmp_path):
    write_picture(tmp_path / "a" / "0.png", picture(0, 5, 5).astype(np.uint16) * 257)
    assert "has Pillow's mode I;16, whose levels do not fit 8 bits; convert it" in sentence(
        source="folder", path=str(tmp_path))


def test_folders_without_classes_or_images_are_refused(tmp_path):
    assert "has no sub-folders, and each class needs one" in sentence(source="folder", path=str(tmp_path))
    (tmp_path / "a").mkdir()
    assert f"the class folder {tmp_path / 'a'} holds no image (.png, .jpg" in sentence(
        source="folder", path=str(tmp_path))


def test_a_camera_held_upright_gives_an_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise, to see it as it was taken
    write_picture(tmp_path / "a" / "0.png", picture(0, 4, 6), exif=exif)
    pixels = read_source(ImageConfig(source="folder", path=str(tmp_path))).train.pixels
    assert np.array_equal(pixels[0, :, :, 0], np.rot90(picture(0, 4, 6), -1))


@pytest.mark.parametrize("mode", GREY + COLOUR)
def test_every_mode_of_8_bits_is_read(mode):
    image = Image.new({"PA": "P"}.get(mode, mode), (3, 2)).convert(mode)
    assert gather([("x", image)], [0], None).pixels.shape == (1, 2, 3, 1 if mode in GREY else 3)


def test_squares_are_the_centre_after_the_shorter_side_is_resized():
    steps = np.zeros((4, 12), dtype=np.uint8)
    steps[:, 4:8] = 200
    assert np.array_equal(squared(Image.fromarray(steps), 4), steps[:, 4:8])
    for height, width, size in ((12, 28, 6), (40, 20, 10), (8, 8, 3), (5, 10, 20)):
        image = Image.fromarray(picture(height, height, width, 3))
        scale = size / min(height, width)
        resized = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
        left, top = (resized.width - size) // 2, (resized.height - size) // 2
        expected = resized.crop((left, top, left + size, top + size))
        assert np.abs(np.asarray(squared(image, size)).astype(int) - np.asarray(expected)).max() <= 1
    assert squared(image, 5).size == (5, 5)
    assert squared(image.resize((7, 7)), 7).tobytes() == image.resize((7, 7)).tobytes()


# ---- which source ----------------------------------------------------------------------------------------------------

def test_no_source_names_the_sources():
    assert sentence() == "images.source is null, so there are no images; set it to digits, idx, folder, dataset"


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'looped[images]'" in sentence(source="digits")
