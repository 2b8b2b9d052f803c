"""Token streams for the settings `data.*`: corpus, tokenizer, and a token cache keyed by content.

`<cache>/<key>/` holds the tokens (`token_cache`); the key is the hash of everything that they depend on, so the cache
is never stale. `<cache>/.manifests/` remembers the key of a source that has not changed (`manifest`), so that a second
start reads no text. Text is read in order and encoded in pieces, in memory that does not grow with it.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from looped.config.data import DataConfig
from looped.data import manifest
from looped.data.corpus import Reading, Split, Survey, source_of
from looped.data.documents import PIECE, AnyDocument, Document, pieces_of, size_of
from looped.data.endless_stream import EndlessStream
from looped.data.mixed_stream import MixedStream
from looped.data.paths import Named
from looped.data.progress import progress
from looped.data.text_sources import Source
from looped.data.token_cache import FORMAT, Tokens, build_once, described, fault, holds, open_folder
from looped.data.token_windows import TokenStream
from looped.data.tokenizer import (
    MIN_FREQUENCY,
    TextTokenizer,
    load_tokenizer,
    lossy,
    read_tokenizer_file,
    train_tokenizer,
)
from looped.errors import UserError
from looped.notices import silent


@dataclass(frozen=True)
class TextData:
    """Token streams, their tokenizer, and the conversion from nats/token to bits/byte.

    vocab_size: the tokenizer's, which can be less than `data.vocab_size`.
    bytes_per_token: held-out UTF-8 bytes per held-out token; an end-of-text token counts as a token of 0 bytes.
    fingerprint: hash of documents, split and tokenizer settings; runs with equal fingerprints see the same tokens.
    known: a hash of all tokens, with the two streams that it is of; for others it is computed when it is asked for.
    """

    train: TokenStream | MixedStream | EndlessStream
    heldout: TokenStream | MixedStream
    tokenizer: TextTokenizer
    vocab_size: int
    bytes_per_token: float
    fingerprint: str
    source: str
    known: tuple[Any, Any, str] | None = None

    picture = None
    """Text has no images."""
    parts: ClassVar[Mapping[str, "TextData"]] = MappingProxyType({})
    """The sources of a mixture; none of a single source."""

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that identify the data, by name: counts, and a hash of all tokens."""
        return {"source": self.source, **_counts(len(self.train.documents), len(self.heldout.documents)),
                "tokens": len(self.train) + len(self.heldout), "held-out tokens": len(self.heldout),
                "vocabulary": self.vocab_size, "bytes/token": self.bytes_per_token,
                "contents": self.contents}

    @property
    def contents(self) -> str:
        """A hash of all tokens."""
        if self.known is not None and self.known[:2] == (self.train, self.heldout):
            return self.known[2]
        return _digest(self.train.tokens, self.heldout.tokens)

    @property
    def end_of_text(self) -> int:
        """The token that ends a document."""
        return self.tokenizer.end_of_text

    def nats_to_bits_per_byte(self, nats: float) -> float:
        """Mean held-out nats/token as bits/byte."""
        return nats / math.log(2) / self.bytes_per_token

    def by_source(self, num: int, figures: Callable[["TextData", int], dict[str, float]]) -> dict[str, float]:
        """Figures of `num` held-out sequences; `figures` gives those of a source and of a number of its sequences."""
        return figures(self, num)

    @property
    def summary(self) -> str:
        """One line for logs."""
        return f"{self.counted}, vocabulary {self.vocab_size:,}, {self.bytes_per_token:.3f} bytes/token"

    @property
    def counted(self) -> str:
        """The source with the numbers of tokens and documents, for logs."""
        return (f"{self.source}: {len(self.train):,} training tokens ({len(self.train.documents):,} documents), "
                f"{len(self.heldout):,} held-out ({len(self.heldout.documents):,})")


def prepare(data: DataConfig) -> TextData:
    """The train and held-out streams of `data`, from the token cache or encoded now.

    Raises `UserError` for bad text, tokenizers and cache folders, and if either side is shorter than one window.
    """
    return find_text(data).open()


@dataclass(frozen=True)
class FoundText:
    """Text whose fingerprint is known, and which is read again to be tokenized. num_bytes: of the text, in UTF-8."""

    data: DataConfig
    source: str
    reading: Reading
    split: Split
    num_bytes: int
    hashed: "Hashed"
    fingerprint: str

    @property
    def facts(self) -> dict[str, Any]:
        """The entries of `TextData.facts` that need no tokens."""
        train, heldout = self.counts
        return {"source": self.source, **_counts(train, heldout)}

    @property
    def counts(self) -> tuple[int, int]:
        """The numbers of documents in training and held out; a single one is cut in two."""
        if self.split.documents == 1:
            return 1, 1
        return self.split.documents - self.split.heldout, self.split.heldout

    def folder(self, tokenizer: TextTokenizer | None = None) -> Path:
        """The folder of its tokens by `tokenizer`, there already or not."""
        return _folder(self.data, self.fingerprint, tokenizer)

    def open(self, tokenizer: TextTokenizer | None = None) -> TextData:
        """The text tokenized by `tokenizer`, by default that of the settings, loaded or trained. Raises `UserError`."""
        data = self.data
        with usable_cache(data):
            folder = self.folder(tokenizer)
            if fault(folder) or not described(folder):
                build_once(folder, lambda: tokenizer or self._tokenizer(), self._sides, loaded=data.tokenizer,
                           num_bytes=self.num_bytes)
            opened = open_folder(folder)
        if tokenizer is None:
            warn_of_size(data, opened.tokenizer)
        found = {"bytes_per_token": opened.heldout_bytes / len(opened.tokens[1]),  # the tokenizer is lossless
                 "fingerprint": self.fingerprint, "source": self.source}
        return _text_data(data, opened, found)

    def prepare(self, tokenizer: TextTokenizer | None = None) -> str:
        """Tokenizes the text, unless that has been done, and says what is there. Raises `UserError`."""
        made = bool(fault(self.folder(tokenizer)))
        text = self.open(tokenizer)
        documents, tokens = sum(self.counts), len(text.train) + len(text.heldout)
        return (f"{'' if made else 'already '}prepared: {text.source}, {documents:,} documents, {self.num_bytes:,} "
                f"bytes of text, {tokens:,} tokens, vocabulary {text.vocab_size:,}, in {self.folder(tokenizer)}")

    def _tokenizer(self) -> TextTokenizer:
        if self.data.tokenizer:
            with silent():  # what there is to say was said for the fingerprint
                return load_tokenizer(self.data.tokenizer)
        with progress("training the tokenizer", self.num_bytes) as advance:
            return train_tokenizer(self.training_pieces(advance), self.data.vocab_size)

    def training_pieces(self, advance: Callable[[int], Any]) -> Iterator[str]:
        """The text to train a tokenizer on, in pieces; advance: told the bytes that are read."""
        for heldout, document in self.split.sides(self.reading.documents()):
            for piece in pieces_of(document.parts()):
                advance(len(piece.encode()))
                if not heldout:
                    yield piece

    def _sides(self) -> Iterator[tuple[bool, AnyDocument]]:
        """The documents and their sides; UserError at the end if they are not those of the fingerprint."""
        hashed = self.hashed.fresh()
        yield from self.split.sides(hashed.passing(self.reading.documents()))
        if hashed.hexdigest() != self.fingerprint:
            raise UserError(f"{self.source} was changed while it was read; start again when nothing writes to it")


class Hashed:
    """The fingerprint of documents and settings, from one document at a time."""

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = settings
        self._digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())

    def fresh(self) -> "Hashed":
        """The hash of the same settings and no documents."""
        return Hashed(self.settings)

    def passing(self, documents: Iterable[AnyDocument]) -> Iterator[AnyDocument]:
        """The documents, each hashed before it is passed on."""
        for document in documents:
            self.add(document)
            yield document

    def add(self, document: AnyDocument) -> int:
        """Hashes a document; returns its size in bytes."""
        name, size = document.name.encode("utf-8", "surrogateescape"), size_of(document)
        self._digest.update(len(name).to_bytes(8, "little"))
        self._digest.update(name)
        self._digest.update(size.to_bytes(8, "little"))
        for part in document.parts():
            self._digest.update(part.encode())
        return size

    def hexdigest(self) -> str:
        return self._digest.hexdigest()[:32]


def find_text(data: DataConfig, source: Source | None = None) -> FoundText:
    """The text of `data`, known by its manifest or read now; source: its source, if that has been looked up. Raises
    `UserError` for bad text and for a missing `data.tokenizer`."""
    reading, hashed = _reading_of(data, source)
    reading.warn_of_files()
    with usable_cache(data):
        known = manifest.remembered(*_manifest_of(data, reading.source, hashed),
                                    lambda: _survey(reading, data.heldout, hashed.fresh()))
    found = _found(data, reading, hashed, known)
    reading.warn_of_cut()
    return found


def known_text(data: DataConfig, source: Source | None = None) -> FoundText | None:
    """The text of `data` if it has been read before; None if it has not, or if a network may be needed to tell. Nothing
    is read but tables' first lines. Raises `UserError`."""
    reading, hashed = _reading_of(data, source)
    if not reading.source.at_hand:
        return None
    known = manifest.recall(*_manifest_of(data, reading.source, hashed))
    return None if known is None else _found(data, reading, hashed, known)


def _reading_of(data: DataConfig, source: Source | None) -> tuple[Reading, "Hashed"]:
    content = read_tokenizer_file(data.tokenizer) if data.tokenizer else None
    trained = {"vocab_size": data.vocab_size, "min_frequency": MIN_FREQUENCY}
    hashed = Hashed({"format": FORMAT, "heldout": data.heldout, "piece": PIECE,
                     "tokenizer": trained if content is None else content})
    return Reading(source or source_of(data, cache_root(data)), data.max_bytes), hashed


def _manifest_of(data: DataConfig, source: Source, hashed: "Hashed") -> tuple[Path, list[Any], Sequence[Named] | None]:
    key = [*source.key, data.text_field, data.max_bytes, hashed.settings]
    return cache_root(data) / manifest.FOLDER, key, source.files


def _found(data: DataConfig, reading: Reading, hashed: "Hashed", known: Mapping[str, Any]) -> FoundText:
    reading.source.opened, reading.cut = known["opened"], known["cut"]
    return FoundText(data, reading.source.name, reading, Split(**known["split"]), known["bytes"], hashed,
                     known["fingerprint"])


def _survey(reading: Reading, share: float, hashed: Hashed) -> tuple[dict[str, Any], int, int]:
    """The facts for a manifest of the text, the number of files it is from, and of those that are read to the end."""
    survey, num_bytes = Survey(share), 0
    sizes = [path.stat().st_size for path in {path for _, path in reading.source.files or ()}]
    with progress("reading", min(reading.max_bytes, sum(sizes) or reading.max_bytes)) as advance:
        for document in reading.documents():
            survey.add(document.name)
            num_bytes += (size := hashed.add(document))
            advance(size)
    split = survey.split()
    known = {"fingerprint": hashed.hexdigest(), "bytes": num_bytes, "split": vars(split), "cut": reading.cut,
             "opened": reading.source.opened}
    return known, *reading.source.files_read(reading.cut is not None)


def cached_text(data: DataConfig, fingerprint: str, tokenizer: TextTokenizer, facts: Mapping[str, Any]
                ) -> TextData | None:
    """The tokens of a text that is no longer available, from the cache by its fingerprint; facts: its
    `TextData.facts`. None if the cache does not have it, or has it with another tokenizer."""
    try:
        folder = _folder(data, fingerprint, tokenizer)
        if not holds(folder, tokenizer) or "bytes/token" not in facts:
            return None
        opened = open_folder(folder)
    except OSError:
        return None
    found = {"bytes_per_token": facts["bytes/token"], "fingerprint": fingerprint,
             "source": f"{facts['source']}, from the token cache"}
    return _text_data(data, opened, found)


def _text_data(data: DataConfig, opened: Tokens, found: Mapping[str, Any]) -> TextData:
    tokenizer = opened.tokenizer
    streams = [TokenStream(name, ids, end_of_text=tokenizer.end_of_text, documents=names)
               for name, ids, names in zip(("train", "held-out"), opened.tokens, opened.names, strict=True)]
    for stream in streams:
        stream.windows(data.length)  # raises where there is none
    known = opened.contents and (*streams, opened.contents)
    return TextData(*streams, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, known=known, **found)


def warn_of_size(data: DataConfig, tokenizer: TextTokenizer) -> None:
    """Warns of a trained vocabulary that is smaller than `data.vocab_size`."""
    if not data.tokenizer and tokenizer.vocab_size < data.vocab_size:
        warnings.warn(f"data.vocab_size {data.vocab_size}: the text supports only {tokenizer.vocab_size} tokens; the "
                      f"vocabulary has that size", stacklevel=4)


def _folder(data: DataConfig, fingerprint: str, tokenizer: TextTokenizer | None) -> Path:
    """The folder of a text's tokens: named by its fingerprint if that tells the tokenizer, else by both."""
    folder = cache_root(data) / fingerprint
    if tokenizer is None or holds(folder, tokenizer):
        return folder
    return folder.with_name(f"{folder.name}-{_digest(tokenizer.json().encode())}")


def _counts(train: int, heldout: int) -> dict[str, int]:
    """Number of documents, and of held-out ones."""
    return {"documents": train + heldout, "held-out documents": heldout}


def _digest(*parts: np.ndarray | bytes) -> str:
    """A short hash of arrays, or of bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part)
    return digest.hexdigest()[:16]


def cache_root(data: DataConfig) -> Path:
    """The folder of the token cache."""
    return Path(data.cache_dir or os.environ.get("LOOPED_CACHE") or "~/.cache/looped").expanduser()


@contextmanager
def usable_cache(data: DataConfig) -> Iterator[None]:
    """Turns an error of the file system inside the block into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"the token cache {cache_root(data)} cannot be used ({error.strerror or error}); set "
                        f"data.cache_dir or $LOOPED_CACHE to a writable folder") from None


def check_lossless(tokenizer: TextTokenizer, documents: Iterable[Document], path: str | Path) -> None:
    """Raises `UserError` for the first document that a tokenizer loaded from `path` does not reproduce exactly."""
    for document in documents:
        if problem := tokenizer.loss_of(document.text):
            raise lossy(path, f"in {document.name} {problem}")
