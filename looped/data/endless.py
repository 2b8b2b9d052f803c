"""Text of a dataset that is streamed and never stored (`data.streaming endless`).

Its first documents are held out, up to `data.heldout_bytes`, and left out of training by the hashes of their texts, in
whatever order the processes meet them. All that is known of it at the start are these documents.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from looped.config.data import DataConfig
from looped.data.documents import Document, size_of
from looped.data.endless_stream import EndlessStream, hash_of
from looped.data.eval_text import encoded, fingerprint_of
from looped.data.text import TextData
from looped.data.text_sources import DatasetSource
from looped.data.tokenizer import TextTokenizer, load_tokenizer
from looped.data.tokenizer_files import read_tokenizer_file
from looped.errors import UserError


@dataclass(frozen=True)
class StreamedText(TextData):
    """Training text without an end, and the held-out documents at its beginning."""

    @property
    def facts(self) -> dict[str, Any]:
        return {**_facts(self.source, self.heldout.documents, str(self.contents)), "held-out tokens": len(self.heldout),
                "vocabulary": self.vocab_size, "bytes/token": self.bytes_per_token}

    @property
    def counted(self) -> str:
        return (f"{self.source}, streamed: {len(self.heldout):,} held-out tokens ({len(self.heldout.documents):,} "
                f"documents)")


@dataclass(frozen=True)
class FoundStream:
    """A stream whose first documents, those to hold out, have been read."""

    data: DataConfig
    source: DatasetSource
    heldout: Sequence[Document]

    @property
    def fingerprint(self) -> str:
        """The hash of what the dataset is called, the tokenizer and the held-out documents."""
        known = [*self.source.key, self.data.text_field, read_tokenizer_file(str(self.data.tokenizer)),
                 fingerprint_of(self.heldout)]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]

    @property
    def facts(self) -> dict[str, Any]:
        """The entries of `StreamedText.facts` that need no tokens."""
        return _facts(self.source.name, self.heldout, fingerprint_of(self.heldout)[:16])

    def open(self, tokenizer: TextTokenizer | None = None) -> StreamedText:
        """The text, encoded by `tokenizer`, by default that of the settings. Raises `UserError`."""
        encoder = tokenizer or load_tokenizer(str(self.data.tokenizer))
        heldout, bytes_per_token = encoded("held-out", self.heldout, encoder, str(self.data.tokenizer))
        heldout.windows(self.data.length)  # raises where there is none
        train = EndlessStream(self.source, encoder, frozenset(map(hash_of, self.heldout)))
        return StreamedText(train, heldout, encoder, encoder.vocab_size, bytes_per_token, self.fingerprint,
                            self.source.name, (train, heldout, fingerprint_of(self.heldout)[:16]))


def find_endless(data: DataConfig) -> FoundStream:
    """The stream that `data` names, with its first documents. Raises `UserError`."""
    source, heldout, size = DatasetSource(data), [], 0
    for document in source.documents():
        if document.text:
            heldout.append(document)
            size += size_of(document)
        if size >= data.heldout_bytes:
            return FoundStream(data, source, heldout)
    raise UserError(f"{source.name} ends after {size:,} bytes, and data.heldout_bytes {data.heldout_bytes:,} holds "
                    f"them all out; lower it, or give more text")


def _facts(source: str, heldout: Sequence[Any], contents: str) -> dict[str, Any]:
    return {"source": source, "held-out documents": len(heldout), "contents": contents}
