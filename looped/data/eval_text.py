"""User-provided text for evaluating a trained model: encoded with the model's tokenizer, and with its byte count, so
that bits/byte are comparable between models with different tokenizers.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from looped.config.data import DataConfig
from looped.data.corpus import load_corpus
from looped.data.text import TextData, check_lossless
from looped.data.text_sources import Document
from looped.data.token_windows import LONGER, TokenStream
from looped.data.tokenizer import TextTokenizer
from looped.errors import UserError


@dataclass(frozen=True)
class HeldoutText:
    """A held-out token stream with its tokenizer; same interface as `TextData`, without the training part.

    bytes_per_token: UTF-8 bytes per token; an end-of-text token counts as a token of 0 bytes.
    fingerprint: hash of the documents alone, so that it is the same under any tokenizer.
    """

    heldout: TokenStream
    tokenizer: TextTokenizer
    bytes_per_token: float
    fingerprint: str
    source: str

    picture = None
    """Text has no images."""
    parts: ClassVar[Mapping[str, TextData]] = TextData.parts
    by_source = TextData.by_source

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that identify the text, by name."""
        return {"source": self.source, "held-out documents": len(self.heldout.documents),
                "held-out tokens": len(self.heldout)}

    @property
    def summary(self) -> str:
        """One line for logs."""
        return (f"{self.source}: {len(self.heldout):,} held-out tokens ({len(self.heldout.documents):,} documents), "
                f"{self.bytes_per_token:.3f} bytes/token")

    def nats_to_bits_per_byte(self, nats: float) -> float:
        """Mean nats/token as bits/byte."""
        return nats / math.log(2) / self.bytes_per_token


MeasuredText = TextData | HeldoutText
"""Text with a held-out part."""


def heldout_text(texts: Iterable[str | Document], tokenizer: TextTokenizer, *,
                 source: str = "text given in Python") -> HeldoutText:
    """Texts as a held-out stream of `tokenizer` (of a run: `run.tokenizer`), each followed by an end-of-text token.

    `load_run(path, data=heldout_text(texts, ...))` evaluates a run on them. Raises `UserError` for one string in place
    of a list, if there is no text, or if the tokenizer does not reproduce a text exactly, since its bytes could then
    not be counted.
    """
    if isinstance(texts, str):
        raise UserError("texts is one string, whose characters would be taken for documents; give a list: "
                        "heldout_text([text], tokenizer)")
    documents = [text if isinstance(text, Document) else Document(f"text {number}", text)
                 for number, text in enumerate(texts, start=1)]
    documents = [document for document in documents if document.text]
    if not documents:
        raise UserError(f"{source} holds no text; give it at least one document that is not empty")
    stream, bytes_per_token = encoded(
        "given", documents, tokenizer, "the run's tokenizer.json",
        longer="give a longer one, or measure it in Python by looped.evaluate_depth, whose sequences may be shorter "
               "than those of training")
    return HeldoutText(stream, tokenizer, bytes_per_token, fingerprint_of(documents), source)


def encoded(name: str, documents: Sequence[Document], tokenizer: TextTokenizer, path: str, *, longer: str = LONGER
            ) -> tuple[TokenStream, float]:
    """Documents in memory as a stream, and their bytes per token. path: of the tokenizer; longer: as of `TokenStream`.
    Raises `UserError` if the tokenizer does not reproduce a text exactly."""
    check_lossless(tokenizer, documents, path)
    tokens = np.concatenate(list(tokenizer.encode_documents([document.text for document in documents])))
    stream = TokenStream(name, tokens, end_of_text=tokenizer.end_of_text,
                         documents=tuple(document.name for document in documents), longer=longer)
    return stream, sum(len(document.text.encode()) for document in documents) / len(tokens)


def read_heldout(path: str, tokenizer: TextTokenizer, data: DataConfig, *, field: str | None = None) -> HeldoutText:
    """Held-out text from a file, a folder or a glob, read like `data.path` in training, up to `data.max_bytes`; `field`
    overrides `data.text_field`. Raises `UserError`."""
    try:
        corpus = load_corpus(DataConfig(path=(path,), text_field=field or data.text_field, max_bytes=data.max_bytes))
    except UserError as error:
        raise UserError(str(error).replace("data.path", "--text").replace("data.text_field", "--text-field")) from None
    return heldout_text(corpus.documents, tokenizer, source=corpus.source)


def fingerprint_of(documents: Sequence[Document]) -> str:
    """The hash of the documents' texts."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(raw := document.text.encode()).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:32]
