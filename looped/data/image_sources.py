"""Readers of labelled images: MNIST's IDX files, one folder per class, Hugging Face `datasets`, scikit-learn's digits.

Every reader returns `Pictures` for training and, if the source has a test part, others for testing. A user's mistake
raises one `UserError` that names the file, the field or the row. Imports no torch.
"""

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from looped.config.images import ImageConfig
from looped.data.idx import read_idx
from looped.data.images_to_arrays import Pictures, gather, resize_all
from looped.data.paths import PassedOver, walk
from looped.errors import UserError, did_you_mean, one_line, root_cause

PARTS = ("train", "test")
IDX_PARTS = {"train": "train", "test": "t10k"}
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")


@dataclass(frozen=True)
class Source:
    """The images of a source; `test` is None if it has no test part."""

    train: Pictures
    test: Pictures | None
    class_names: tuple[str, ...]
    name: str


def read_source(config: ImageConfig) -> Source:
    """The images that `config` names, all of one size and number of channels. Raises `UserError`."""
    readers = {"digits": read_digits, "idx": read_idx_folder, "folder": read_class_folders, "dataset": read_dataset}
    if config.source is None:
        raise UserError(f"images.source is null, so there are no images; set it to {', '.join(readers)}")
    source = readers[config.source](config)
    if source.test is None or source.test.pixels.shape[1:] == source.train.pixels.shape[1:]:
        return source
    sides = [" x ".join(map(str, part.pixels.shape[1:3])) for part in (source.train, source.test)]
    if sides[0] != sides[1]:
        raise UserError(f"{source.name}: training images are {sides[0]} pixels (height x width) and test images "
                        f"{sides[1]}; set images.size to make all of them squares of one size")
    return replace(source, train=source.train.as_colour(), test=source.test.as_colour())


# ---- scikit-learn's digits -------------------------------------------------------------------------------------------

def read_digits(config: ImageConfig) -> Source:
    """1,797 handwritten digits of 8 x 8, levels 0 ... 16 scaled to 0 ... 255 (Alpaydin and Kaynak 1998, UCI)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("images.source digits needs scikit-learn; pip install 'looped[images]', or use another "
                        "source") from None
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    part = Pictures(resize_all(pixels, config.size), digits.target.astype(np.int64))
    return Source(part, None, tuple(map(str, digits.target_names)), "digits")


# ---- IDX, the format of MNIST ----------------------------------------------------------------------------------------

def read_idx_folder(config: ImageConfig) -> Source:
    """The files `train-images-idx3-ubyte` and `train-labels-idx1-ubyte` of a folder, and `t10k-...` if it has them."""
    folder = _existing_folder(config)
    parts = {part: _read_idx_part(folder, stem, config) for part, stem in IDX_PARTS.items()
             if part == "train" or _idx_file(folder, stem, "images") or _idx_file(folder, stem, "labels")}
    num_classes = 1 + max(int(part.labels.max()) for part in parts.values())
    return Source(parts["train"], parts.get("test"), tuple(map(str, range(num_classes))), str(folder))


def _read_idx_part(folder: Path, stem: str, config: ImageConfig) -> Pictures:
    files = {kind: _idx_file(folder, stem, kind) for kind in ("images", "labels")}
    for kind, path in files.items():
        if path is None:
            raise UserError(f"images.path {folder} has no {_idx_name(stem, kind)} (nor .gz); put it there, or point "
                            f"images.path to the folder that holds it")
    images, labels = read_idx(files["images"], axes=3), read_idx(files["labels"], axes=1)
    if len(images) != len(labels):
        raise UserError(f"{files['images']} holds {len(images)} images and {files['labels']} {len(labels)} labels; "
                        f"take both from the same release")
    if not images.size:
        raise UserError(f"{files['images']} holds no image (shape {' x '.join(map(str, images.shape))}); "
                        f"restore it from its source")
    return Pictures(resize_all(images[..., None], config.size), labels.astype(np.int64))


def _idx_name(stem: str, kind: str) -> str:
    return f"{stem}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"


def _idx_file(folder: Path, stem: str, kind: str) -> Path | None:
    plain = folder / _idx_name(stem, kind)
    return next((path for path in (plain, plain.with_name(f"{plain.name}.gz")) if path.is_file()), None)


def _existing_folder(config: ImageConfig) -> Path:
    assert config.path is not None
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"images.path {config.path} {problem}; name the folder that holds the images")
    return folder


# ---- one folder per class --------------------------------------------------------------------------------------------

def read_class_folders(config: ImageConfig) -> Source:
    """Images from one sub-folder per class, searched recursively; below train/ and test/ if there is a train/."""
    folder = _existing_folder(config)
    has_parts = (folder / "train").is_dir()
    train_folder, test_folder = (folder / "train", folder / "test") if has_parts else (folder, None)
    names, passed = _class_names(train_folder), _skipped_outside(folder, has_parts)
    paths = {"train": _in_classes(train_folder, names, passed)}
    if test_folder is not None and test_folder.is_dir():
        for name in _class_names(test_folder):
            if name not in names:
                raise UserError(f"{test_folder / name} is a class that {train_folder} does not have"
                                f"{did_you_mean(name, names)}")
        paths["test"] = _in_classes(test_folder, [name for name in names if (test_folder / name).is_dir()], passed)
    if +passed:
        warnings.warn(f"images.path {folder}: skipped {passed}; images are files of {', '.join(SUFFIXES)} in the "
                      f"folder of their class", stacklevel=2)
    parts = {part: gather(((str(path), _open_image(path, str(path))) for path, _ in found),
                         [names.index(name) for _, name in found], config.size) for part, found in paths.items()}
    return Source(parts["train"], parts.get("test"), tuple(names), str(folder))


def _class_names(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise UserError(f"images.path: {folder} has no sub-folders, and each class needs one; put the images of "
                        f"each class into a folder named after it")
    return names


def _skipped_outside(folder: Path, has_parts: bool) -> PassedOver:
    """Counts of the skipped entries next to the class folders, or next to train/ and test/."""
    passed = PassedOver()
    parts = [path for path in sorted(folder.iterdir()) if has_parts and path.is_dir()]
    for path in parts:
        if path.name not in PARTS:
            passed["hidden" if path.name.startswith(".") else f"{path.name}/ next to train/"] += 1
    for place in (folder, *(path for path in parts if path.name in PARTS)):
        passed["in no class folder"] += sum(
            path.suffix.lower() in SUFFIXES and path.is_file() for path in place.iterdir())
    return passed


def _in_classes(folder: Path, names: list[str], passed: PassedOver) -> list[tuple[Path, str]]:
    """(file, class) of every image, sorted by class and path."""
    found = []
    for name in names:
        files = []
        for path in sorted(walk(folder / name, passed)):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                files.append(path)
            else:
                passed[path.suffix.lower() or path.name] += 1
        if not files:
            raise UserError(f"the class folder {folder / name} holds no image ({', '.join(SUFFIXES[:5])}, ...); "
                            f"fill it or remove it")
        found += [(path, name) for path in files]
    return found


def _open_image(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            return ImageOps.exif_transpose(image)  # upright, by the camera's orientation tag
    except Exception as error:  # decoders raise anything for a broken file
        raise UserError(f"{name} is not an image that Pillow reads ({one_line(error)}); restore or remove it") from None


# ---- Hugging Face datasets -------------------------------------------------------------------------------------------

def read_dataset(config: ImageConfig) -> Source:
    """Two splits of `datasets.load_dataset`; the second is `images.test_split`, by default `test` if it exists."""
    import datasets

    splits = [config.split] if config.test_split is None else [config.split, config.test_split]
    try:
        if config.test_split is None and "test" not in config.split:  # which may be train+test
            names = datasets.get_dataset_split_names(config.dataset, config.dataset_config)
            splits += ["test"] if "test" in names else []
        tables = [datasets.load_dataset(config.dataset, config.dataset_config, split=split) for split in splits]
    except Exception as error:  # load_dataset raises whatever the network, a reader or a builder raises
        raise UserError(f"images.dataset {config.dataset} cannot be read ({one_line(root_cause(error))}); check its "
                        f"name, images.dataset_config, images.split, images.test_split and the network, or use "
                        f"images.path") from None
    where = [f"images.dataset {config.dataset} ({split})" for split in splits]
    for table, place in zip(tables, where, strict=True):
        _check_fields(table, config, place)
    names, numbers = _classes(tables[0], config, where[0])
    parts = [gather(_images(table, config, place), _numbers(table[config.label_field], numbers, place), config.size)
             for table, place in zip(tables, where, strict=True)]
    return Source(parts[0], parts[1] if len(parts) > 1 else None, names, f"dataset {config.dataset}")


def _check_fields(table: Any, config: ImageConfig, where: str) -> None:
    for setting in ("image_field", "label_field"):
        field = getattr(config, setting)
        if field not in table.column_names:
            raise UserError(f"{where} has no field '{field}'{did_you_mean(field, table.column_names)}; "
                            f"set images.{setting}")
    if not len(table):
        raise UserError(f"{where} has no rows; choose another images.split or images.test_split")


def _classes(table: Any, config: ImageConfig, where: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """(class names, label value -> class number)."""
    names = getattr(table.features[config.label_field], "names", None)  # of a ClassLabel
    if names is not None:
        return tuple(names), {number: number for number in range(len(names))}
    values = table[config.label_field]
    for row, value in enumerate(values):
        if not isinstance(value, int | str):
            raise UserError(f"{where} row {row}: field '{config.label_field}' holds {type(value).__name__}, not a "
                            f"class; set images.label_field to a field of whole numbers or text")
    known = sorted(set(values))
    return tuple(map(str, known)), {value: number for number, value in enumerate(known)}


def _numbers(labels: Sequence[Any], numbers: dict[Any, int], where: str) -> list[int]:
    for row, label in enumerate(labels):
        if label not in numbers:
            raise UserError(f"{where} row {row} has the label {label!r}, which is none of the {len(numbers)} "
                            f"training classes; choose another images.test_split, or remove such rows")
    return [numbers[label] for label in labels]


def _images(table: Any, config: ImageConfig, where: str) -> Iterator[tuple[str, Image.Image]]:
    table = table.select_columns([config.image_field])
    for row in range(len(table)):
        name = f"{where} row {row}"
        try:
            value = table[row][config.image_field]
        except Exception as error:  # of the decoder
            raise UserError(f"{name} is not an image that Pillow reads ({one_line(error)}); leave it out") from None
        if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):  # a file whose type was not declared
            value = _open_image(io.BytesIO(value["bytes"]), name)
        if not isinstance(value, Image.Image):
            raise UserError(f"{name}: field '{config.image_field}' holds {type(value).__name__}, not an image; "
                            f"set images.image_field to a field of images")
        yield name, value
