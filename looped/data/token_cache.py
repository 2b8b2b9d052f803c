"""A folder of token files: built piece by piece, resumed where it was interrupted, and verified when it is opened.

    <folder>/train.bin, heldout.bin        the tokens, little-endian, 2 bytes each up to 65,536 tokens, else 4
             train.names, heldout.names    the documents' names, each ended by a zero byte
             tokenizer.json
             meta.json                     hashes, sizes and times of the files, and counts

It is built in `.<folder>.building` and renamed when it is whole. A file whose size and time are those in meta.json is
not hashed again. Folders of earlier versions have neither names nor counts; they get them when they are opened with
their text.
"""

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, overload

import numpy as np

from looped.atomic_files import lock_for, sync, write_text
from looped.data.documents import PIECE, AnyDocument, pieces_of
from looped.data.manifest import SETTLED, sha256_of
from looped.data.progress import progress
from looped.data.tokenizer import TextTokenizer, batches, lossy, parse_tokenizer
from looped.errors import UserError

FORMAT = 1  # increase it when the same documents and settings would give other files
TOKENS = ("train.bin", "heldout.bin")
NAMES = ("train.names", "heldout.names")
TOKENIZER = "tokenizer.json"
META = "meta.json"
PROGRESS = "progress.json"
FILES = (*TOKENS, TOKENIZER)

BATCH = PIECE * min(max(os.cpu_count() or 1, 2), 8)
"""Characters encoded at once: a piece of a long document for each of at most 8 cores, some 50 bytes per character."""

SAVE_EVERY = 1 << 26
"""Bytes of text after which an interrupted build goes on."""

Sides = Callable[[], Iterator[tuple[bool, AnyDocument]]]
"""Opens the text: (True if held out, document), in the same order at every call."""


class Names(Sequence[str]):
    """The names of the documents of one side, read when they are asked for."""

    def __init__(self, path: Path, num: int):
        self.path = path
        self.num = num

    def __len__(self) -> int:
        return self.num

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: SupportsIndex | slice) -> str | tuple[str, ...]:
        if isinstance(place, slice):
            return tuple(self[number] for number in range(*place.indices(self.num)))
        number = range(self.num)[place]  # raises IndexError, as the end of a loop needs
        start = self._ends[number - 1] + 1 if number else 0
        return self._bytes[start : self._ends[number]].tobytes().decode("utf-8", "surrogateescape")

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.flatnonzero(self._bytes == 0)


@dataclass(frozen=True)
class Tokens:
    """An open folder: both sides' tokens and names. contents: a hash of all tokens; heldout_bytes: of the held-out text
    in UTF-8. Folders of earlier versions have no names, and None for the two."""

    tokenizer: TextTokenizer
    tokens: tuple[np.ndarray, np.ndarray]
    names: tuple[Sequence[str], Sequence[str]]
    contents: str | None
    heldout_bytes: int | None


def fault(folder: Path) -> str:
    """The reason why a folder cannot be used, "" if it can."""
    if not folder.exists():
        return "absent"
    try:
        meta = _read_meta(folder)
        known, changed = meta.get("state", {}), {}
        for name in meta["sha256"].keys() | set(FILES):
            if (state := _state(folder / name)) != known.get(name):
                if sha256_of(folder / name) != meta["sha256"][name]:
                    return f"{name} has another hash"
                changed[name] = state
        if "state" in meta and changed and all(mtime < time.time_ns() - SETTLED for _, mtime in changed.values()):
            with suppress(OSError):  # the folder was copied
                _write_meta(folder, meta | {"state": known | changed})
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return "a file is missing"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "its meta.json is broken"
    return ""


def holds(folder: Path, tokenizer: TextTokenizer) -> bool:
    """True if a folder is intact and its tokens are those of `tokenizer`."""
    return not fault(folder) and (folder / TOKENIZER).read_text(encoding="utf-8") == tokenizer.json()


def open_folder(folder: Path) -> Tokens:
    """The tokens of an intact folder."""
    meta = _read_meta(folder)
    tokenizer = parse_tokenizer((folder / TOKENIZER).read_text(encoding="utf-8"), folder / TOKENIZER)
    train, heldout = (np.memmap(folder / name, dtype=dtype_of(tokenizer), mode="r") for name in TOKENS)
    names = tuple(Names(folder / name, num) for name, num in zip(NAMES, meta.get("documents", ()), strict=False))
    return Tokens(tokenizer, (train, heldout), names or ((), ()), meta.get("contents"), meta.get("heldout_bytes"))


def dtype_of(tokenizer: TextTokenizer) -> str:
    """The type of tokens in files: uint16 for up to 65,536 of them, else uint32."""
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def build_once(folder: Path, tokenizer: Callable[[], TextTokenizer], sides: Sides, *, loaded: str | None,
               num_bytes: int) -> None:
    """Builds the folder if needed; of several concurrent processes one does the work and the others wait.

    loaded: where the tokenizer is from if it was not trained on the text, which it must then reproduce. num_bytes: of
    the text. Raises `UserError` for a text that the tokenizer changes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock_for(folder.with_name(f".{folder.name}.lock")):
        found = fault(folder)
        if found not in ("", "absent"):
            warnings.warn(f"the token cache {folder} is damaged ({found}) and is rebuilt", stacklevel=4)
        if found:
            _build(folder, tokenizer, sides, loaded, num_bytes)
        elif not described(folder):
            _describe(folder, sides)


def described(folder: Path) -> bool:
    """True if an intact folder has names and counts, which those of earlier versions have not."""
    return "documents" in _read_meta(folder)


# Building

class Piece(NamedTuple):
    """A piece of a document's text, for the train or the held-out side; last: it ends the document."""

    heldout: bool
    name: str
    text: str
    last: bool


@dataclass
class Done:
    """Progress of a build, also in its progress.json. sizes: bytes by file; documents: on each side."""

    format: int = FORMAT
    pieces: int = 0
    documents: list[int] = field(default_factory=lambda: [0, 0])
    heldout_bytes: int = 0
    sizes: dict[str, int] = field(default_factory=dict)


class Writer:
    """Appends to the files of a folder that is being built, starting at the position in `done`."""

    def __init__(self, folder: Path, done: Done, stack: ExitStack):
        self.folder = folder
        self.done = done
        self.files = {name: stack.enter_context((folder / name).open("ab")) for name in (*TOKENS, *NAMES)}
        for name, file in self.files.items():
            file.truncate(done.sizes.get(name, 0))

    def add(self, piece: Piece, ids: np.ndarray, end: np.ndarray) -> None:
        """Appends the tokens of a piece; those of `end` and the name follow the last one of a document."""
        side, size = int(piece.heldout), len(piece.text.encode())
        self.files[TOKENS[side]].write(ids.tobytes())
        self.done.pieces += 1
        self.done.heldout_bytes += size * side
        if piece.last:
            self.files[TOKENS[side]].write(end.tobytes())
            self.files[NAMES[side]].write(_named(piece.name))
            self.done.documents[side] += 1

    def save(self) -> None:
        """Makes what is written so far survive an interruption."""
        for name, file in self.files.items():
            file.flush()
            sync(self.folder / name)
            self.done.sizes[name] = file.tell()
        write_text(self.folder / PROGRESS, json.dumps(asdict(self.done)))


def _build(folder: Path, tokenizer: Callable[[], TextTokenizer], sides: Sides, loaded: str | None,
           num_bytes: int) -> None:
    building = folder.with_name(f".{folder.name}.building")  # ours alone while the lock is held
    fresh = building / "fresh"
    try:
        fresh.mkdir(parents=True, exist_ok=True)
        encoder = kept_tokenizer(fresh)
        if encoder is None:
            encoder = tokenizer()
            write_text(fresh / TOKENIZER, encoder.json())
        done = _encode(fresh, encoder, sides, loaded, num_bytes)
    except UserError:
        shutil.rmtree(building, ignore_errors=True)
        raise
    (fresh / PROGRESS).unlink(missing_ok=True)
    for name in TOKENS:  # later changes then have another time, however coarse the file system's
        os.utime(fresh / name, ns=(time.time_ns(), time.time_ns() - 2 * SETTLED))
    _write_meta(fresh, _described(fresh, {name: sha256_of(fresh / name) for name in (*FILES, *NAMES)}, done))
    shutil.rmtree(building / "damaged", ignore_errors=True)
    if folder.exists():
        os.replace(folder, building / "damaged")
    os.replace(fresh, folder)
    shutil.rmtree(building)


def kept_tokenizer(folder: Path) -> TextTokenizer | None:
    """The tokenizer in a folder, such as that of an interrupted build; None if there is none."""
    try:
        return parse_tokenizer((folder / TOKENIZER).read_text(encoding="utf-8"), folder / TOKENIZER)
    except (OSError, UserError, ValueError):
        return None


def _encode(fresh: Path, tokenizer: TextTokenizer, sides: Sides, loaded: str | None, num_bytes: int) -> Done:
    dtype, done = dtype_of(tokenizer), _done(fresh)
    end = np.array([tokenizer.end_of_text], dtype=dtype)
    with ExitStack() as stack:
        writer = Writer(fresh, done, stack)
        advance = stack.enter_context(progress("encoding", num_bytes))
        pieces, unsaved = _pieces(sides()), 0
        for piece in islice(pieces, done.pieces):
            advance(len(piece.text.encode()))
        for batch in batches(pieces, lambda piece: len(piece.text), BATCH):
            encoded = tokenizer.encode_pieces([piece.text for piece in batch])
            for piece, ids in zip(batch, encoded, strict=True):
                if loaded and (change := tokenizer.change_of(piece.text, ids)):
                    raise lossy(loaded, f"in {piece.name} {change}")
                writer.add(piece, ids.astype(dtype), end)
            size = sum(len(piece.text.encode()) for piece in batch)
            advance(size)
            unsaved += size
            if unsaved >= SAVE_EVERY:
                writer.save()
                unsaved = 0
        writer.save()
    return done


def _done(fresh: Path) -> Done:
    """The progress of an interrupted build, nothing if there is none."""
    try:
        done = Done(**json.loads((fresh / PROGRESS).read_text(encoding="utf-8")))
        whole = all((fresh / name).stat().st_size >= size for name, size in done.sizes.items())
        return done if whole and done.format == FORMAT else Done()
    except (OSError, ValueError, TypeError, AttributeError):
        return Done()


def _pieces(sides: Iterable[tuple[bool, AnyDocument]]) -> Iterator[Piece]:
    for heldout, document in sides:
        before = None
        for text in pieces_of(document.parts()):
            if before is not None:
                yield Piece(heldout, document.name, before, last=False)
            before = text
        yield Piece(heldout, document.name, before or "", last=True)


def _describe(folder: Path, sides: Sides) -> None:
    """Adds names and counts to an intact folder of an earlier version."""
    done = Done()
    with ExitStack() as stack:
        files = [stack.enter_context((folder / name).open("wb")) for name in NAMES]
        for heldout, document in sides():
            files[heldout].write(_named(document.name))
            done.documents[heldout] += 1
            done.heldout_bytes += heldout * sum(len(part.encode()) for part in document.parts())
    hashes = _read_meta(folder)["sha256"] | {name: sha256_of(folder / name) for name in NAMES}
    _write_meta(folder, _described(folder, hashes, done))


def _named(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape") + b"\0"


# meta.json

def _described(folder: Path, hashes: dict[str, str], done: Done) -> dict[str, Any]:
    contents = hashlib.sha256()
    for name in TOKENS:
        with (folder / name).open("rb") as file:
            while part := file.read(1 << 20):
                contents.update(part)
    return {"format": FORMAT, "sha256": hashes, "contents": contents.hexdigest()[:16], "documents": done.documents,
            "heldout_bytes": done.heldout_bytes,
            "state": {name: _state(folder / name) for name in hashes}}


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    meta = {name: value for name, value in meta.items() if name != "check"}
    write_text(folder / META, json.dumps(meta | {"check": _check(meta)}, indent=1))


def _read_meta(folder: Path) -> dict[str, Any]:
    """The content of meta.json. Raises ValueError if it is damaged; that of an earlier version has no check."""
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    if "check" not in meta:
        return {name: meta[name] for name in ("format", "sha256")}
    if meta.pop("check") != _check(meta):
        raise ValueError(f"{folder / META} has another hash")
    return meta


def _check(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
