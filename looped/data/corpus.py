"""The corpus of a run: named documents from one source, and their split into train and held-out.

Without `data.path` and `data.dataset` it is the standard library of the running Python interpreter, source files and
pydoc topics, which every machine with Python has. Imports no torch.
"""

import hashlib
import importlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from looped.config.data import DataConfig
from looped.data.formats import Document, read_file
from looped.data.text_sources import DatasetSource, FileSource, Source
from looped.errors import UserError

# Tests and bundled packages are not the library's own text; the tables in `encodings` are near duplicates, which would
# leak from train to held-out.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled",
                   "lib-dynload", "encodings"}
# Machine-specific, or (topics.py) read topic by topic below.
SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize", "topics.py")


@dataclass(frozen=True)
class Corpus:
    """Non-empty documents in reading order; `source` describes their origin."""

    documents: tuple[Document, ...]
    source: str

    def split(self, share: float) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
        """(train, held-out) with about a fraction `share` of the documents held out; neither side is empty.

        A document's side depends only on the hash of its name, so adding, removing or reordering others moves nothing.
        Two exceptions keep both sides non-empty: if all names fall on one side, the one nearest the boundary changes
        sides; a single document is cut into head and tail at a line break.
        """
        if len(self.documents) == 1:
            return _cut_in_two(self.documents[0], share)
        places = {document.name: place_of(document.name) for document in self.documents}
        heldout = {name for name, place in places.items() if place < share} or {min(places, key=places.get)}
        if len(heldout) == len(places):
            heldout.remove(max(places, key=places.get))
        return (tuple(document for document in self.documents if document.name not in heldout),
                tuple(document for document in self.documents if document.name in heldout))


def load_corpus(data: DataConfig) -> Corpus:
    """Reads the source that `data` names, up to `data.max_bytes`, with a warning if text is cut off or files skipped.

    Raises `UserError` for unreadable input, which names the file and the line, byte or field, and a fix.
    """
    source = _source(data)
    for notice in source.notices:
        warnings.warn(notice, stacklevel=2)
    taken, cut = _take(source.documents(), data.max_bytes)
    if not taken:
        raise UserError(f"{source.name} holds no text; point data.path or data.dataset to some")
    if cut:
        warnings.warn(f"data.max_bytes {data.max_bytes:,} cuts the text off in {taken[-1].name}, its document "
                      f"{len(taken):,} in reading order; {source.extent()}", stacklevel=2)
    return Corpus(_unique(taken), source.name)


def _source(data: DataConfig) -> Source:
    if data.path:
        return FileSource(data.path, field=data.text_field, limit=data.max_bytes)
    return DatasetSource(data) if data.dataset else StandardLibrary(data.max_bytes)


class StandardLibrary(Source):
    """Sources and pydoc topics of the running interpreter, sorted by name (relative path), utf-8."""

    def __init__(self, limit: int):
        self.name: str = f"standard library of Python {platform.python_version()}"
        self.limit = limit
        root = Path(sysconfig.get_path("stdlib"))
        self.topics: dict[str, str] = _pydoc_topics()
        self.files: dict[str, Path] = {path.relative_to(root).as_posix(): path for path in _library_files(root)}
        self.opened: int = 0

    def documents(self) -> Iterator[Document]:
        for name in sorted([*self.topics, *self.files]):
            self.opened += 1
            if name in self.topics:
                yield Document(name, self.topics[name])
            else:
                yield from read_file(self.files[name], name, field="", limit=self.limit)

    def extent(self) -> str:
        whole = len(self.topics) + len(self.files)
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


def _take(documents: Iterable[Document], max_bytes: int) -> tuple[list[Document], bool]:
    """(non-empty documents up to `max_bytes`, the last one cut after a whole character; True if text is left)."""
    taken, left = [], max_bytes
    for name, text in documents:
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"document {name} is not valid Unicode (a lone surrogate at character {error.start}); "
                            f"fix it or leave it out") from None
        if raw and not left:
            return taken, True
        kept = text if len(raw) <= left else raw[:left].decode("utf-8", errors="ignore")
        if kept:
            taken.append(Document(name, kept))
        if len(raw) > left:
            return taken, True
        left -= len(raw)
    return taken, False


def _unique(documents: Iterable[Document]) -> tuple[Document, ...]:
    """Documents with unique names: a repeated name (two folders with the same file) gets `~2`, `~3`, ..."""
    met: dict[str, int] = {}
    unique = []
    for name, text in documents:
        met[name] = count = met.get(name, 0) + 1
        unique.append(Document(name if count == 1 else f"{name}~{count}", text))
    return tuple(unique)


def place_of(name: str) -> float:
    """Hash of a name as a number in [0, 1)."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=7).digest()
    return int.from_bytes(digest, "big") / 256**7


def _cut_in_two(document: Document, share: float) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    name, text = document
    middle = min(max(round(len(text) * (1 - share)), 1), len(text) - 1)
    if middle < 1:
        raise UserError(f"{name} is the only document and too short to split ({len(text)} character); "
                        f"point data.path or data.dataset to more text")
    near = (len(text) - middle) // 2  # a line break farther off would change the split too much
    before = text.rfind("\n", max(middle - near, 0), middle) + 1
    behind = text.find("\n", middle, middle + near) + 1
    cut = min((place for place in (before, behind) if place), key=lambda place: abs(place - middle), default=middle)
    return (Document(f"{name} (head)", text[:cut]),), (Document(f"{name} (tail)", text[cut:]),)
