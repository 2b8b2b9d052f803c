"""What a config trains on: text, the problems of a task, or labelled images."""

import glob
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looped.config import Config
from looped.data.images import Scale
from looped.data.labelled import LabelledData, prepare_labelled, rescaled
from looped.data.problems import TaskData, prepare_task
from looped.data.text import TextData, find_text
from looped.data.tokenizer import TextTokenizer, load_tokenizer

Data = TextData | TaskData | LabelledData

PATHS = ("data.path", "data.dataset", "data.tokenizer", "data.cache_dir", "images.path", "images.dataset")
"""Settings that can be relative paths."""


@dataclass(frozen=True)
class Seen:
    """The means that turn data into numbers as a trained model knows them: a tokenizer, or the scale of images; None
    where the data's own is right."""

    tokenizer: TextTokenizer | None = None
    scale: Scale | None = None


@dataclass(frozen=True)
class Found:
    """Data that are there: their `fingerprint` and `facts`, known before `open` makes them ready."""

    fingerprint: str
    facts: Mapping[str, Any]
    open: Callable[[Seen], Data]


def find_data(config: Config) -> Found:
    """The text, the task or the images of a config. Raises UserError where they cannot be had."""
    if config.is_images:
        images = prepare_labelled(config.images, config.model.patch_size)
        return Found(images.fingerprint, images.facts, lambda seen: rescaled(images, seen.scale or images.images.scale))
    if config.is_task:
        task = prepare_task(config.task)
        return Found(task.fingerprint, task.facts, lambda seen: task)
    text = find_text(config.data)
    return Found(text.fingerprint, text.facts, lambda seen: text.open(seen.tokenizer))


def open_data(config: Config) -> Data:
    """The text, the task or the images of a config, ready. Raises UserError where they cannot be had."""
    return find_data(config).open(Seen())


def located(config: Config, folder: Path) -> Config:
    """The config with its relative paths in `folder`, where something is there; the others are left as they are."""
    values, changes = config.model_dump(mode="json"), {}
    for name in PATHS:
        section, _, setting = name.partition(".")
        value = values[section][setting]
        if value:
            changes[name] = _within(value, folder) if isinstance(value, str) else [_within(each, folder)
                                                                                   for each in value]
    return config.replace(**changes)


def _within(entry: str, folder: Path) -> str:
    path = folder / Path(entry).expanduser()
    return str(path) if path.exists() or (glob.has_magic(entry) and glob.glob(str(path), recursive=True)) else entry


def vocab_size_of(config: Config) -> int:
    """Symbols of a task, or classes of images; of text, which is not read for it, the tokens of the tokenizer that is
    loaded, or those that one is trained to have. Raises UserError where they cannot be had."""
    if config.is_task or config.is_images:
        return open_data(config).vocab_size
    return load_tokenizer(config.data.tokenizer).vocab_size if config.data.tokenizer else config.data.vocab_size
