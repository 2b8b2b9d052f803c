"""The corpus of a run: named documents from one source, and their split into train and held-out.

Without `data.path` and `data.dataset` it is the standard library of the running Python interpreter, source files and
pydoc topics, which every machine with Python has. Imports no torch.
"""

import hashlib
import importlib
import os
import platform
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from looped.config.data import DataConfig
from looped.data.documents import AnyDocument, Document, characters_in, cut_in_two, size_of
from looped.data.formats import read_file
from looped.data.paths import Named
from looped.data.text_sources import DatasetSource, FileSource, Source, StreamedSource
from looped.errors import UserError

# Tests and bundled packages are not the library's own text; the tables in `encodings` are near duplicates, which would
# leak from train to held-out.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled",
                   "lib-dynload", "encodings"}
# Machine-specific, or (topics.py) read topic by topic below.
SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize", "topics.py")


@dataclass(frozen=True)
class Split:
    """The sides of documents, one at a time.

    A document's side depends only on the hash of its name, so adding, removing or reordering others moves nothing.
    Two exceptions keep both sides non-empty: if all names fall on one side, the one nearest the boundary changes
    sides (`moved`); a single document is cut into head and tail at a line break.

    share: the fraction to hold out, about. documents, heldout: how many there are, and how many are held out.
    """

    share: float
    documents: int
    heldout: int
    moved: str | None = None

    def sides(self, documents: Iterable[AnyDocument]) -> Iterator[tuple[bool, AnyDocument]]:
        """(True if held out, document) in the order of the documents."""
        if self.documents == 1:
            documents = list(documents)
            yield from zip((False, True), cut_in_two(documents[0], self.share), strict=True)
            return
        for document in documents:
            yield (place_of(document.name) < self.share) != (document.name == self.moved), document


class Survey:
    """The facts about documents' names that their split needs, told one at a time."""

    def __init__(self, share: float):
        self.share = share
        self.documents = self.heldout = 0
        self.lowest: tuple[float, str] = (2, "")
        self.highest: tuple[float, str] = (-1, "")

    def add(self, name: str) -> None:
        place = place_of(name)
        self.documents += 1
        self.heldout += place < self.share
        if place < self.lowest[0]:
            self.lowest = (place, name)
        if place > self.highest[0]:
            self.highest = (place, name)

    def split(self) -> Split:
        if self.documents > 1 and self.heldout == 0:
            return Split(self.share, self.documents, 1, self.lowest[1])
        if self.documents > 1 and self.heldout == self.documents:
            return Split(self.share, self.documents, self.documents - 1, self.highest[1])
        return Split(self.share, self.documents, self.heldout)


@dataclass(frozen=True)
class Corpus:
    """Non-empty documents in reading order; `source` describes their origin."""

    documents: tuple[AnyDocument, ...]
    source: str

    def split(self, share: float) -> tuple[tuple[AnyDocument, ...], tuple[AnyDocument, ...]]:
        """(train, held-out) with about a fraction `share` of the documents held out, by `Split`; neither is empty."""
        survey = Survey(share)
        for document in self.documents:
            survey.add(document.name)
        sides = list(survey.split().sides(self.documents))
        return (tuple(document for heldout, document in sides if not heldout),
                tuple(document for heldout, document in sides if heldout))


class Reading:
    """The documents of a source up to a number of bytes, with names of their own, as often as they are asked for.

    cut: the last document and its number if `max_bytes` has left text unread, after a complete reading.
    """

    def __init__(self, source: Source, max_bytes: int):
        self.source = source
        self.max_bytes = max_bytes
        self.cut: tuple[str, int] | None = None

    def documents(self) -> Iterator[AnyDocument]:
        """Non-empty documents; the last one is cut after a whole character. Raises `UserError` for unreadable input,
        which names the file and the line, byte or field, and a fix, and for a source without text."""
        self.cut = None
        taken = self._take()
        empty = True
        for document in taken if self.source.distinct else _unique(taken):
            empty = False
            yield document
        if empty:
            raise UserError(f"{self.source.name} holds no text; point data.path or data.dataset to some")

    def warn_of_files(self) -> None:
        """Warns of files that are skipped, or not read as a user may expect."""
        for notice in self.source.notices:
            warnings.warn(notice, stacklevel=3)

    def warn_of_cut(self) -> None:
        """Warns of text that is cut off."""
        if self.cut is not None:
            name, number = self.cut
            warnings.warn(f"data.max_bytes {self.max_bytes:,} cuts the text off in {name}, its document {number:,} in "
                          f"reading order; {self.source.extent()}", stacklevel=3)

    def _take(self) -> Iterator[AnyDocument]:
        left, number, name = self.max_bytes, 0, ""
        for document in self.source.documents():
            size = size_of(document)
            kept = document if size <= left else document.between(0, characters_in(document, left))
            if any(kept.parts()):
                number, name = number + 1, document.name
                yield kept
            if size > left:
                self.cut = (name, number) if number else None
                return
            left -= size


def load_corpus(data: DataConfig) -> Corpus:
    """Reads the source that `data` names into memory, up to `data.max_bytes`, with a warning if text is cut off or
    files are skipped. Raises `UserError` as `Reading.documents` does."""
    reading = Reading(source_of(data, Path(tempfile.gettempdir())), data.max_bytes)
    reading.warn_of_files()
    documents = tuple(reading.documents())
    reading.warn_of_cut()
    return Corpus(documents, reading.source.name)


def source_of(data: DataConfig, folder: Path) -> Source:
    """The source that `data` names; folder: where the rows of a stream may be kept while the process runs."""
    if data.path:
        return FileSource(data.path, field=data.text_field, limit=data.max_bytes)
    if data.dataset:
        return StreamedSource(data, folder) if data.streaming else DatasetSource(data)
    return StandardLibrary(data.max_bytes)


class StandardLibrary(Source):
    """Sources and pydoc topics of the running interpreter, sorted by name (relative path), utf-8."""

    def __init__(self, limit: int):
        self.name: str = f"standard library of Python {platform.python_version()}"
        self.limit = limit
        root = Path(sysconfig.get_path("stdlib"))
        self.key = ("standard library", str(root), platform.python_version())
        self.topics: dict[str, str] = _pydoc_topics()
        self.modules: dict[str, Path] = {path.relative_to(root).as_posix(): path for path in _library_files(root)}
        self.names: list[str] = sorted([*self.topics, *self.modules])

    @property
    def files(self) -> Sequence[Named]:
        """A file of each name; all topics are in one."""
        topics = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
        return [(name, self.modules.get(name, topics)) for name in self.names]

    def documents(self) -> Iterator[AnyDocument]:
        self.opened = 0
        for name in self.names:
            self.opened += 1
            if name in self.topics:
                yield Document(name, self.topics[name])
            else:
                yield from read_file(self.modules[name], name, field="", limit=self.limit)

    def extent(self) -> str:
        whole = len(self.names)
        return f"of {whole:,} modules and topics, {whole - self.opened:,} are not read"


def _library_files(root: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith("config-")]
        yield from (Path(parent, name) for name in names if name.endswith(".py") and not name.startswith(SKIPPED_FILES))


def _pydoc_topics() -> dict[str, str]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # a minimal installation
        return {}
    return {f"pydoc_data/topics/{name}": text for name, text in topics.items()}


def _unique(documents: Iterable[AnyDocument]) -> Iterator[AnyDocument]:
    """Documents with unique names: a repeated name (two folders with the same file) gets `~2`, `~3`, ..."""
    met: dict[str, int] = {}
    for document in documents:
        met[document.name] = count = met.get(document.name, 0) + 1
        yield document if count == 1 else document.named(f"{document.name}~{count}")


def place_of(name: str) -> float:
    """Hash of a name as a number in [0, 1)."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=7).digest()
    return int.from_bytes(digest, "big") / 256**7
