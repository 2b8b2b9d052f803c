"""Token streams for the settings `data.*`: corpus, tokenizer, and a token cache keyed by content.

`<cache>/<key>/{train.bin, heldout.bin, tokenizer.json, meta.json}`; the key is the hash of everything that the files
depend on, so the cache is never stale. It is written to a temporary folder and renamed; reading verifies its hashes.
"""

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from looped.config.data import DataConfig
from looped.data.corpus import Corpus, load_corpus
from looped.data.loader import TokenStream
from looped.data.text_sources import Document
from looped.data.tokenizer import (
    MIN_FREQUENCY,
    PIECE,
    TextTokenizer,
    load_tokenizer,
    lossy,
    parse_tokenizer,
    read_tokenizer_file,
    train_tokenizer,
)
from looped.errors import UserError
from looped.storage import lock_for

FORMAT = 1  # increase it when the same documents and settings would give other files
FILES = ("train.bin", "heldout.bin", "tokenizer.json")


@dataclass(frozen=True)
class TextData:
    """Token streams, their tokenizer, and the conversion from nats/token to bits/byte.

    vocab_size: the tokenizer's, which can be less than `data.vocab_size`.
    bytes_per_token: held-out UTF-8 bytes per held-out token; an end-of-text token counts as a token of 0 bytes.
    fingerprint: hash of documents, split and tokenizer settings; runs with equal fingerprints see the same tokens.
    """

    train: TokenStream
    heldout: TokenStream
    tokenizer: TextTokenizer
    vocab_size: int
    bytes_per_token: float
    fingerprint: str
    source: str

    picture = None
    """Text has no images."""

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that identify the data, by name: counts, and a hash of all tokens."""
        return {"source": self.source, **_counts(self.train.documents, self.heldout.documents),
                "tokens": len(self.train) + len(self.heldout), "held-out tokens": len(self.heldout),
                "vocabulary": self.vocab_size, "bytes/token": self.bytes_per_token,
                "contents": _digest(self.train.tokens, self.heldout.tokens)}

    @property
    def end_of_text(self) -> int:
        """The token that ends a document."""
        return self.tokenizer.end_of_text

    def nats_to_bits_per_byte(self, nats: float) -> float:
        """Mean held-out nats/token as bits/byte."""
        return nats / math.log(2) / self.bytes_per_token

    @property
    def summary(self) -> str:
        """One line for logs."""
        return (f"{self.source}: {len(self.train):,} training tokens ({len(self.train.documents):,} documents), "
                f"{len(self.heldout):,} held-out ({len(self.heldout.documents):,}), vocabulary {self.vocab_size:,}, "
                f"{self.bytes_per_token:.3f} bytes/token")


def prepare(data: DataConfig) -> TextData:
    """The train and held-out streams of `data`, from the token cache or encoded now.

    Raises `UserError` for bad text, tokenizers and cache folders, and if either side is shorter than one window.
    """
    return find_text(data).open()


@dataclass(frozen=True)
class FoundText:
    """Text that has been read and split, but not yet tokenized."""

    data: DataConfig
    source: str
    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    fingerprint: str

    @property
    def facts(self) -> dict[str, Any]:
        """The entries of `TextData.facts` that need no tokens."""
        return {"source": self.source, **_counts(self.train, self.heldout)}

    def open(self, tokenizer: TextTokenizer | None = None) -> TextData:
        """The text tokenized by `tokenizer`, by default that of the settings, loaded or trained. Raises `UserError`."""
        data, folder = self.data, _cache_root(self.data) / self.fingerprint
        if tokenizer is not None and not _holds(folder, tokenizer):
            folder = folder.with_name(f"{folder.name}-{_digest(tokenizer.json().encode())}")
        try:
            if _fault(folder):
                _build_once(self, tokenizer, folder)
            encoder, *tokens = _open(folder)
        except OSError as error:
            raise UserError(f"the token cache {folder} cannot be used ({error.strerror or error}); "
                            f"set data.cache_dir or $LOOPED_CACHE to a writable folder") from None
        if tokenizer is None and not data.tokenizer and encoder.vocab_size < data.vocab_size:
            warnings.warn(f"data.vocab_size {data.vocab_size}: the text supports only {encoder.vocab_size} tokens; "
                          f"the vocabulary has that size", stacklevel=3)
        heldout_bytes = sum(len(document.text.encode()) for document in self.heldout)  # the tokenizer is lossless
        names = (tuple(document.name for document in side) for side in (self.train, self.heldout))
        found = {"bytes_per_token": heldout_bytes / len(tokens[1]), "fingerprint": self.fingerprint,
                 "source": self.source}
        return _text_data(data, encoder, tokens, names, found)


def find_text(data: DataConfig) -> FoundText:
    """The text of `data`, read and split. Raises `UserError` for bad text and for a missing `data.tokenizer`."""
    corpus = load_corpus(data)
    content = read_tokenizer_file(data.tokenizer) if data.tokenizer else None
    return FoundText(data, corpus.source, *corpus.split(data.heldout), _fingerprint(corpus, data, content))


def cached_text(data: DataConfig, fingerprint: str, tokenizer: TextTokenizer, facts: Mapping[str, Any]
                ) -> TextData | None:
    """The tokens of a text that is no longer available, from the cache by its fingerprint; facts: its
    `TextData.facts`. None if the cache does not have it, or has it with another tokenizer."""
    try:
        folder = _cache_root(data) / fingerprint
        if not _holds(folder, tokenizer) or "bytes/token" not in facts:
            return None
        _, *tokens = _open(folder)
    except OSError:
        return None
    found = {"bytes_per_token": facts["bytes/token"], "fingerprint": fingerprint,
             "source": f"{facts['source']}, from the token cache"}
    return _text_data(data, tokenizer, tokens, ((), ()), found)


def _text_data(data: DataConfig, tokenizer: TextTokenizer, tokens: Sequence[np.ndarray],
               documents: Iterable[tuple[str, ...]], found: Mapping[str, Any]) -> TextData:
    streams = [TokenStream(name, ids, end_of_text=tokenizer.end_of_text, documents=names)
               for name, ids, names in zip(("train", "held-out"), tokens, documents, strict=True)]
    for stream in streams:
        stream.windows(data.length)  # raises where there is none
    return TextData(*streams, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, **found)


def _counts(train: Sequence, heldout: Sequence) -> dict[str, int]:
    """Number of documents, and of held-out ones."""
    return {"documents": len(train) + len(heldout), "held-out documents": len(heldout)}


def _digest(*parts: np.ndarray | bytes) -> str:
    """A short hash of arrays, or of bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part)
    return digest.hexdigest()[:16]


def _fingerprint(corpus: Corpus, data: DataConfig, tokenizer: str | None) -> str:
    trained = {"vocab_size": data.vocab_size, "min_frequency": MIN_FREQUENCY}
    settings = {"format": FORMAT, "heldout": data.heldout, "piece": PIECE,
                "tokenizer": trained if tokenizer is None else tokenizer}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, text in corpus.documents:
        for part in (name.encode("utf-8", "surrogateescape"), text.encode()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()[:32]


def _cache_root(data: DataConfig) -> Path:
    return Path(data.cache_dir or os.environ.get("LOOPED_CACHE") or "~/.cache/looped").expanduser()


def _fault(folder: Path) -> str:
    """The reason why a cache folder cannot be used, "" if it can."""
    if not folder.exists():
        return "absent"
    try:
        sha256 = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["sha256"]
        changed = [name for name in FILES if _sha256(folder / name) != sha256[name]]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return "a file is missing"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "its meta.json is broken"
    return f"{changed[0]} has another hash" if changed else ""


def _holds(folder: Path, tokenizer: TextTokenizer) -> bool:
    """True if a cache folder is intact and its tokens are those of `tokenizer`."""
    return not _fault(folder) and (folder / "tokenizer.json").read_text(encoding="utf-8") == tokenizer.json()


def _open(folder: Path) -> tuple[TextTokenizer, np.ndarray, np.ndarray]:
    """(tokenizer, train tokens, held-out tokens) of an intact cache folder."""
    tokenizer = parse_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"), folder / "tokenizer.json")
    train, heldout = (np.memmap(folder / name, dtype=_dtype(tokenizer), mode="r") for name in FILES[:2])
    return tokenizer, train, heldout


def _dtype(tokenizer: TextTokenizer) -> str:
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def _build_once(text: FoundText, tokenizer: TextTokenizer | None, folder: Path) -> None:
    """Builds the cache folder if needed; of several concurrent processes one does the work and the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock_for(folder.with_name(f".{folder.name}.lock")):
        fault = _fault(folder)
        if fault not in ("", "absent"):
            warnings.warn(f"the token cache {folder} is damaged ({fault}) and is rebuilt", stacklevel=3)
        if fault:
            _build(text, tokenizer, folder)


def _build(text: FoundText, tokenizer: TextTokenizer | None, folder: Path) -> None:
    data = text.data
    if tokenizer is None:
        tokenizer = (load_tokenizer(data.tokenizer) if data.tokenizer else
                     train_tokenizer((document.text for document in text.train), data.vocab_size))
    if data.tokenizer:
        check_lossless(tokenizer, text.train + text.heldout, data.tokenizer)
    building = folder.with_name(f".{folder.name}.building")  # ours alone while the lock is held
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    _write(building / "fresh", tokenizer, text.train, text.heldout)
    if folder.exists():
        os.replace(folder, building / "damaged")
    os.replace(building / "fresh", folder)
    shutil.rmtree(building)


def check_lossless(tokenizer: TextTokenizer, documents: Iterable[Document], path: str | Path) -> None:
    """Raises `UserError` for the first document that a tokenizer loaded from `path` does not reproduce exactly."""
    for document in documents:
        if problem := tokenizer.loss_of(document.text):
            raise lossy(path, f"in {document.name} {problem}")


def _write(folder: Path, tokenizer: TextTokenizer, train: tuple[Document, ...], heldout: tuple[Document, ...]) -> None:
    folder.mkdir()
    for name, documents in zip(FILES[:2], (train, heldout), strict=True):
        with (folder / name).open("wb") as file:
            for ids in tokenizer.encode_documents([document.text for document in documents]):
                file.write(ids.astype(_dtype(tokenizer)).tobytes())
    (folder / "tokenizer.json").write_text(tokenizer.json(), encoding="utf-8", newline="")
    meta = {"format": FORMAT, "sha256": {name: _sha256(folder / name) for name in FILES}}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8", newline="")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
