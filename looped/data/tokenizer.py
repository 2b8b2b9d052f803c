"""Byte-level BPE: trained on the training documents, or loaded (see `tokenizer_files`).

Any Unicode text survives a round trip byte for byte: there is no normaliser, and the alphabet holds all 256 bytes. Text
that spells out a special token is encoded as ordinary text, so `end_of_text` in a stream always ends a document.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from looped.data.documents import PIECE, pieces_of
from looped.data.tokenizer_files import (
    END_OF_TEXT,
    known_end,
    mark_end,
    marked_end,
    parse_backend,
    read_tokenizer_file,
)
from looped.errors import UserError

T = TypeVar("T")

MIN_FREQUENCY = 2  # a pair seen once is no pattern: merging it would copy the text into the vocabulary
# No decomposed letters: a tokenizer that composes them, as Qwen's does, reproduces all texts that have none.
PROBE = "Text, numbers 0123 and\n\n    code: f(x) = {[\"a'b\"]};\t naïve Ω 中文 🙂\r\n"


class TextTokenizer:
    """Text to token ids and back; `vocab_size` is the number of embeddings needed. end: the end-of-text token, which
    must be in the backend's vocabulary."""

    def __init__(self, backend: Tokenizer, end: str):
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._backend = backend
        self.end_token = end
        self.end_of_text: int = vocabulary[end]
        self.vocab_size: int = max(vocabulary.values()) + 1

    def token_id(self, token: str | None) -> int | None:
        """The id of a token, None if the vocabulary does not have it."""
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, *, framed: bool = False) -> list[int]:
        """Token ids of a text, without an end-of-text token. framed: with the special tokens that the tokenizer's
        template adds, such as Llama's start token."""
        return self._backend.encode(text, add_special_tokens=framed).ids

    def decode(self, ids: Sequence[int] | np.ndarray | Tensor) -> str:
        """The text of token ids, of a list, an array or a tensor; end-of-text tokens and the -1 that `looped.generate`
        puts after them are dropped, incomplete UTF-8 becomes U+FFFD."""
        return self._backend.decode([int(each) for each in ids if each >= 0], skip_special_tokens=True)

    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each piece of text, uint32, without end-of-text tokens; encoded on all cores."""
        return [np.array(encoding.ids, dtype=np.uint32)
                for encoding in self._backend.encode_batch_fast(list(pieces), add_special_tokens=False)]

    def encode_documents(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """The token ids of each text followed by `end_of_text`, uint32, in order; encoded in batches on all cores."""
        for group in batches(texts, len, 8 * PIECE):
            pieces = [list(pieces_of([text])) for text in group]
            encoded = iter(self.encode_pieces([piece for part in pieces for piece in part]))
            for part in pieces:
                yield np.concatenate([*(next(encoded) for _ in part), np.array([self.end_of_text], dtype=np.uint32)])

    def loss_of(self, text: str) -> str | None:
        """A description of how a round trip changes a text; None if it does not."""
        changes = (self.change_of(piece, self.encode(piece)) for piece in pieces_of([text]))
        return next(filter(None, changes), None)

    def change_of(self, piece: str, ids: Sequence[int] | np.ndarray) -> str | None:
        """A description of how a piece of text differs from what its token ids decode to; None if it does not."""
        back = self.decode(ids)
        if back == piece:
            return None
        place = next((i for i, (a, b) in enumerate(zip(piece, back, strict=False)) if a != b),
                     min(len(piece), len(back)))
        return f"{piece[place:place + 12]!r} comes back as {back[place:place + 12]!r}"

    def json(self) -> str:
        """The content of a tokenizer.json; `parse_tokenizer` reads it back."""
        text = self._backend.to_str()
        return text if self.end_token == known_end(self._backend) else mark_end(text, self.end_token)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Byte-level BPE over the texts, deterministic; fewer than `vocab_size` tokens if the text supports no more."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=MIN_FREQUENCY, special_tokens=[END_OF_TEXT],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator((piece for text in texts for piece in pieces_of([text])), trainer)
    return TextTokenizer(backend, END_OF_TEXT)


def load_tokenizer(path: str | Path, end: int | None = None) -> TextTokenizer:
    """Reads `data.tokenizer`: a tokenizer.json, a folder that `save_pretrained` wrote, or a repository of the hub.
    Raises `UserError` if it is none of them, or does not decode what it encodes. end: see `read_tokenizer_file`."""
    tokenizer = parse_tokenizer(read_tokenizer_file(path, end), path)
    if problem := tokenizer.loss_of(PROBE):
        raise lossy(path, problem)
    return tokenizer


def parse_tokenizer(text: str, path: str | Path) -> TextTokenizer:
    """The tokenizer in a tokenizer.json's content. If it has no known end-of-text token, one is added."""
    backend = parse_backend(text, path)
    end = marked_end(text) or known_end(backend) or END_OF_TEXT
    if end not in backend.get_vocab(with_added_tokens=True):
        backend.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    return TextTokenizer(backend, end)


def lossy(path: str | Path, problem: str) -> UserError:
    return UserError(f"data.tokenizer {path} does not decode what it encodes ({problem}); "
                     f"use a byte-level one, or leave it null to train one")


def batches(items: Iterable[T], size: Callable[[T], int], enough: int) -> Iterator[list[T]]:
    """The items in order, in lists whose sizes add up to about `enough`."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= enough:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
