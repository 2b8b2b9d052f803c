"""The data of a config: text, problems of a task, labelled images, or the data of a custom domain."""

import glob
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from looped.config import Config
from looped.config.unread_settings import num_sequences_of
from looped.data.endless import find_endless
from looped.data.image_batches import LabelledData, prepare_labelled, rescaled
from looped.data.images import Normalizer
from looped.data.mixture import cached_mixture, find_mixture
from looped.data.task_data import TaskData, prepare_task
from looped.data.text import TextData, cached_text, find_text
from looped.data.tokenizer import TextTokenizer, load_tokenizer
from looped.errors import UserError
from looped.import_path import class_at

Data = TextData | TaskData | LabelledData

PATHS = ("data.path", "data.dataset", "data.tokenizer", "data.cache_dir", "images.path", "images.dataset")
"""Settings that can be relative paths."""


@dataclass(frozen=True)
class Seen:
    """The preprocessing of a trained model: its tokenizer, or its normalisation of images; None: that of the data."""

    tokenizer: TextTokenizer | None = None
    scale: Normalizer | None = None


@dataclass(frozen=True)
class Found:
    """Data that exist: `fingerprint` and `facts` are known before `open` prepares them. prepare: does the work that the
    first `open` would do and later ones find done, and says what is there; without one there is no such work."""

    fingerprint: str
    facts: Mapping[str, Any]
    open: Callable[[Seen], Data]
    prepare: Callable[[], str] = lambda: "nothing to prepare: these data are made or read as they are needed"


def _find_text(config: Config) -> Found:
    data = config.data
    if data.streaming == "endless":
        stream = find_endless(data)
        return Found(stream.fingerprint, stream.facts, lambda seen: stream.open(seen.tokenizer))
    text = find_mixture(data, num_sequences_of(config)) if data.mixture else find_text(data)
    return Found(text.fingerprint, text.facts, lambda seen: text.open(seen.tokenizer), text.prepare)


def _find_task(config: Config) -> Found:
    task = prepare_task(config.task)
    return Found(task.fingerprint, task.facts, lambda seen: task)


def _find_images(config: Config) -> Found:
    images = prepare_labelled(config.images, config.model.patch_size)
    return Found(images.fingerprint, images.facts, lambda seen: rescaled(images, seen.scale or images.images.scale))


def _tokens_of(config: Config) -> int:
    """Vocabulary size without reading the text: of the tokenizer to load, or the one set for training."""
    return load_tokenizer(config.data.tokenizer).vocab_size if config.data.tokenizer else config.data.vocab_size


def _symbols_of(config: Config) -> int:
    return open_data(config).vocab_size


def cached_data(config: Config, fingerprint: str, tokenizer: TextTokenizer, facts: Mapping[str, Any]
                ) -> TextData | None:
    """Text that is no longer available, from the token cache; None if that does not have it."""
    return (cached_mixture if config.data.mixture else cached_text)(config.data, fingerprint, tokenizer, facts)


@runtime_checkable
class Source(Protocol):
    """A kind of data: how it is found, and its number of tokens, symbols or classes. A custom `Domain` is one."""

    def find(self, config: Config) -> Found: ...

    def vocab_size(self, config: Config) -> int: ...


@dataclass(frozen=True)
class Known:
    """A built-in source."""

    find: Callable[[Config], Found]
    vocab_size: Callable[[Config], int]


SOURCES: dict[str, Source] = {
    "text": Known(_find_text, _tokens_of), "puzzles": Known(_find_task, _symbols_of),
    "classify": Known(_find_images, _symbols_of), "generate": Known(_find_images, _symbols_of)}
"""Name of a `looped.config.data_kinds.Kind` -> its source."""


def source_of(config: Config) -> Source:
    """The source of a config's kind of data."""
    if config.domain.name is not None:
        return class_at(config.domain.name, "domain.name")()
    return SOURCES[config.kind.name]


def find_data(config: Config) -> Found:
    """The text, task or images of a config, or the data of its domain. Raises UserError if they cannot be loaded."""
    try:
        found = source_of(config).find(config)
    except TypeError as error:
        if config.domain.name is None:
            raise
        raise UserError(f"domain.options {config.domain.options} do not fit domain.name {config.domain.name}: {error}; "
                        f"see its class for its options") from error
    if not isinstance(found, Found):
        raise UserError(f"find of domain.name {config.domain.name} returned {found!r}; return a "
                        f"looped.data.from_config.Found(fingerprint, facts, open)")
    return found


def open_data(config: Config) -> Data:
    """The text, task or images of a config, ready for use. Raises UserError if they cannot be loaded."""
    return find_data(config).open(Seen())


def located(config: Config, folder: Path) -> Config:
    """The config with relative paths resolved in `folder` if they exist there; other paths are unchanged."""
    changes = {}
    for name in (*PATHS, *(f"data.mixture.{source}.{each}" for source in config.data.mixture
                           for each in ("path", "dataset"))):
        value = reduce(lambda values, part: values[part], name.split("."), config.model_dump(mode="json"))
        if value:
            changes[name] = _within(value, folder) if isinstance(value, str) else [_within(each, folder)
                                                                                   for each in value]
    return config.replace(**changes)


def _within(entry: str, folder: Path) -> str:
    path = folder / Path(entry).expanduser()
    return str(path) if path.exists() or (glob.has_magic(entry) and glob.glob(str(path), recursive=True)) else entry


def vocab_size_of(config: Config) -> int:
    """Number of tokens of text, symbols of a task, or classes of images. Raises UserError if they cannot be loaded."""
    return source_of(config).vocab_size(config)
