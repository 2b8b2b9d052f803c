"""Any text to measure a trained model on: encoded by the model's own tokenizer, with the bytes that its tokens stand
for, so that bits/byte compare between models of different tokenizers.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from looped.config.data import DataConfig
from looped.data.corpus import load_corpus
from looped.data.loader import TokenStream
from looped.data.sources import Document
from looped.data.text import TextData, check_lossless
from looped.data.tokenizer import TextTokenizer
from looped.errors import UserError


@dataclass(frozen=True)
class HeldoutText:
    """A held-out token stream with its tokenizer; the same members as `TextData` but for what is trained on.

    bytes_per_token: UTF-8 bytes over tokens; ends of text count as tokens and hold no byte.
    fingerprint: hash of the documents alone, so that it is the same under any tokenizer.
    """

    heldout: TokenStream
    tokenizer: TextTokenizer
    bytes_per_token: float
    fingerprint: str
    source: str

    picture = None
    """There is none to look at."""

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def facts(self) -> dict[str, Any]:
        """The identity of the text, by name."""
        return {"source": self.source, "held-out documents": len(self.heldout.documents),
                "held-out tokens": len(self.heldout)}

    @property
    def summary(self) -> str:
        """One line for logs."""
        return (f"{self.source}: {len(self.heldout):,} tokens of {len(self.heldout.documents):,} documents held out, "
                f"{self.bytes_per_token:.3f} bytes/token")

    def nats_to_bits_per_byte(self, nats: float) -> float:
        """Mean nats/token as bits/byte."""
        return nats / math.log(2) / self.bytes_per_token


MeasuredText = TextData | HeldoutText
"""Text with a held-out part."""


def heldout_text(texts: Iterable[str | Document], tokenizer: TextTokenizer, *,
                 source: str = "text given in Python") -> HeldoutText:
    """Texts as a held-out stream of `tokenizer` (a run's: `run.tokenizer`), each followed by an end of text.

    `load_run(path, data=heldout_text(texts, ...))` measures a run on them. Raises `UserError` where there is no text,
    or where the tokenizer does not give one back as it was, so that its bytes could not be counted.
    """
    documents = [text if isinstance(text, Document) else Document(f"text {number}", text)
                 for number, text in enumerate(texts, start=1)]
    documents = [document for document in documents if document.text]
    if not documents:
        raise UserError(f"{source} holds no text; give it at least one document that is not empty")
    check_lossless(tokenizer, documents, "the run's tokenizer.json")
    tokens = np.concatenate(list(tokenizer.encode_documents([document.text for document in documents])))
    stream = TokenStream("given", tokens, end_of_text=tokenizer.end_of_text,
                         documents=tuple(document.name for document in documents))
    num_bytes = sum(len(document.text.encode()) for document in documents)
    return HeldoutText(stream, tokenizer, num_bytes / len(tokens), _fingerprint(documents), source)


def read_heldout(path: str, tokenizer: TextTokenizer, data: DataConfig, *, field: str | None = None) -> HeldoutText:
    """The text of a file, a folder or a glob, read as training reads `data.path`: up to `data.max_bytes`, of JSON lines
    and parquet the `field`, or else `data.text_field`. Raises `UserError`."""
    try:
        corpus = load_corpus(DataConfig(path=(path,), text_field=field or data.text_field, max_bytes=data.max_bytes))
    except UserError as error:
        raise UserError(str(error).replace("data.path", "--text").replace("data.text_field", "--text-field")) from None
    return heldout_text(corpus.documents, tokenizer, source=corpus.source)


def _fingerprint(documents: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(raw := document.text.encode()).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:32]
