"""From `data.*` to token streams: corpus, tokenizer, and a token cache keyed by content.

`<cache>/<key>/{train.bin, heldout.bin, tokenizer.json, meta.json}`; the key is the hash of all that the files depend
on, so a stale cache cannot be met. It is written beside and renamed, and its own hashes are checked when it is read.
"""

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from looped.config_data import DataConfig
from looped.data.corpus import Corpus, load_corpus
from looped.data.loader import TokenStream
from looped.data.sources import Document
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

FORMAT = 1  # raise it when the same documents and settings would give other files
FILES = ("train.bin", "heldout.bin", "tokenizer.json")


@dataclass(frozen=True)
class TextData:
    """Token streams, their tokenizer, and what turns nats per token into bits per byte.

    vocab_size: the tokenizer's, which can be less than `data.vocab_size`.
    bytes_per_token: held-out UTF-8 bytes over held-out tokens; ends of text count as tokens and hold no byte.
    fingerprint: hash of documents, split and tokenizer settings; two runs with the same one see the same tokens.
    """

    train: TokenStream
    heldout: TokenStream
    tokenizer: TextTokenizer
    vocab_size: int
    bytes_per_token: float
    fingerprint: str
    source: str

    picture = None
    """There is none to look at."""

    def nats_to_bits_per_byte(self, nats: float) -> float:
        """Mean nats per held-out token as bits per held-out byte."""
        return nats / math.log(2) / self.bytes_per_token

    @property
    def summary(self) -> str:
        """One line for logs."""
        return (f"{self.source}: {len(self.train):,} tokens of {len(self.train.documents):,} documents to train, "
                f"{len(self.heldout):,} of {len(self.heldout.documents):,} held out, vocabulary {self.vocab_size:,}, "
                f"{self.bytes_per_token:.3f} bytes a token")


def prepare(data: DataConfig) -> TextData:
    """The train and held-out streams of `data`, out of the token cache or encoded now.

    Raises `UserError` for bad text, tokenizers and cache folders, and where either side is shorter than one window.
    """
    corpus = load_corpus(data)
    content = read_tokenizer_file(data.tokenizer) if data.tokenizer else None
    key = _fingerprint(corpus, data, content)
    folder = _cache_root(data) / key
    train, heldout = corpus.split(data.heldout)
    try:
        if _fault(folder):
            _build_once(train, heldout, data, folder)
        tokenizer, *tokens = _open(folder)
    except OSError as error:
        raise UserError(f"the token cache {folder} cannot be used ({error.strerror or error}); "
                        f"set data.cache_dir or $LOOPED_CACHE to a folder that can be written") from None
    if not data.tokenizer and tokenizer.vocab_size < data.vocab_size:
        warnings.warn(f"data.vocab_size {data.vocab_size}: the text supports a vocabulary of {tokenizer.vocab_size}, "
                      f"which is used", stacklevel=3)
    streams = [TokenStream(name, ids, end_of_text=tokenizer.end_of_text, documents=tuple(doc.name for doc in side))
               for name, ids, side in zip(("train", "held-out"), tokens, (train, heldout), strict=True)]
    for stream in streams:
        stream.windows(data.length)  # raises where there is none
    heldout_bytes = sum(len(document.text.encode()) for document in heldout)  # the tokenizer is lossless
    return TextData(*streams, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, fingerprint=key,
                    bytes_per_token=heldout_bytes / len(streams[1]), source=corpus.source)


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
    """What keeps a cache folder from being used, "" if nothing does."""
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


def _open(folder: Path) -> tuple[TextTokenizer, np.ndarray, np.ndarray]:
    """Tokenizer, train tokens and held-out tokens of a whole cache folder."""
    tokenizer = parse_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"), folder / "tokenizer.json")
    train, heldout = (np.memmap(folder / name, dtype=_dtype(tokenizer), mode="r") for name in FILES[:2])
    return tokenizer, train, heldout


def _dtype(tokenizer: TextTokenizer) -> str:
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def _build_once(train: tuple[Document, ...], heldout: tuple[Document, ...], data: DataConfig, folder: Path) -> None:
    """Makes the cache folder whole; of several processes at once the first does the work and the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock_for(folder.with_name(f".{folder.name}.lock")):
        fault = _fault(folder)
        if fault not in ("", "absent"):
            warnings.warn(f"the token cache {folder} is damaged ({fault}) and is built anew", stacklevel=3)
        if fault:
            _build(train, heldout, data, folder)


def _build(train: tuple[Document, ...], heldout: tuple[Document, ...], data: DataConfig, folder: Path) -> None:
    if data.tokenizer:
        tokenizer = load_tokenizer(data.tokenizer)
        _check_lossless(tokenizer, train + heldout, data.tokenizer)
    else:
        tokenizer = train_tokenizer((document.text for document in train), data.vocab_size)
    building = folder.with_name(f".{folder.name}.building")  # ours alone while the lock is held
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    _write(building / "fresh", tokenizer, train, heldout)
    if folder.exists():
        os.replace(folder, building / "damaged")
    os.replace(building / "fresh", folder)
    shutil.rmtree(building)


def _check_lossless(tokenizer: TextTokenizer, documents: Iterable[Document], path: str) -> None:
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
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
