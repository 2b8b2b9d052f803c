"""Windows of a dataset that is streamed, encoded as it is trained on and never stored.

Each process reads its part of the rows (`datasets.distributed.split_dataset_by_node`) in order, epoch after epoch, and
cuts them into windows of length + 1 tokens at a stride of `length`. So a window depends on those before it and on the
number of processes, and the place in the stream has to be kept: the state of the dataset before the document in which
the next window begins, and the tokens of that document that are used up. Both are exact, since the rows are not
shuffled.
"""

from collections import deque
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from hashlib import blake2b
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looped.data.documents import Document
from looped.data.text_field import text_of
from looped.data.text_sources import DatasetSource
from looped.data.tokenizer import TextTokenizer
from looped.errors import UserError
from looped.tensor_types import Int

AT_ONCE = 1 << 16
"""Characters of documents that are encoded together, on all cores."""


@dataclass(frozen=True)
class Place:
    """A place in the stream of a process: `offset` tokens into document `document` of an epoch. state: of the dataset
    before that document; None: its beginning."""

    epoch: int = 0
    document: int = 0
    offset: int = 0
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class Encoded:
    """A document of the stream: the place of its first token, its name and its tokens, uint32."""

    start: Place
    name: str
    tokens: np.ndarray


class EndlessStream:
    """The rows of a streamed dataset but the documents whose hashes are in `left_out`, as training windows.

    Batches are asked for in the order of their steps, and those of the last two steps again at will, also by another
    thread than `place`.
    """

    def __init__(self, source: DatasetSource, tokenizer: TextTokenizer, left_out: Set[bytes]):
        self.source = source
        self.tokenizer = tokenizer
        self.left_out = left_out
        self.end_of_text: int = tokenizer.end_of_text
        self._lock = Lock()
        self.go_to(None, 0, 1)

    # ---- the place ---------------------------------------------------------------------------------------------------

    def go_to(self, places: Sequence[Any] | None, rank: int, num_processes: int) -> None:
        """Go on as process `rank` from the places of all processes in a checkpoint; None: from the beginning. Raises
        `UserError` if they were another number of processes."""
        if places is not None and len(places) != num_processes:
            raise UserError(f"the checkpoint has the places of {len(places)} processes in the stream of "
                            f"{self.source.name}, and their number now is {num_processes}; start {len(places)} "
                            f"processes, or choose another --run and give it this one as training.warm_start")
        self.rank, self.num_processes = rank, num_processes
        self._here = Place() if places is None else Place(**places[rank])
        self._waiting: deque[Encoded] = deque()
        self._arriving: Iterator[Encoded] = self._encoded(self._here)
        self._begins: dict[int, Place] = {}
        self._kept: dict[tuple[int, int], tuple[Tensor, str]] = {}

    def place(self, step: int) -> dict[str, Any]:
        """The place of this process's first window of `step`, for `go_to`."""
        with self._lock:
            return asdict(self._begins.get(step, self._here))

    # ---- windows -----------------------------------------------------------------------------------------------------

    def batch(self, step: int, *, batch_size: int, length: int, seed: int,
              rows: range | None = None) -> Int[Tensor, "rows length_and_one"]:
        """The given rows (all of them by default) of the batch of optimiser step `step`: of a step that has not been
        asked for, the next windows of this process."""
        return torch.stack([tokens for tokens, _ in self._windows(step, batch_size, length, rows)])

    def describe(self, step: int, *, batch_size: int, length: int, seed: int, rows: range | None = None) -> list[str]:
        """One line per row of a batch: the documents that it is from."""
        numbers = range(batch_size) if rows is None else rows
        return [f"row {row}: {name}" for row, (_, name) in zip(
            numbers, self._windows(step, batch_size, length, rows), strict=True)]

    def _windows(self, step: int, batch_size: int, length: int, rows: range | None) -> list[tuple[Tensor, str]]:
        places = [(step, row) for row in (range(batch_size) if rows is None else rows)]
        with self._lock:
            for place in places:
                if place not in self._kept:
                    self._begins.setdefault(step, self._here)
                    self._kept[place] = self._next(length)
            self._kept = {place: window for place, window in self._kept.items() if place[0] >= step - 1}
            self._begins = {each: begin for each, begin in self._begins.items() if each >= step - 1}
            return [self._kept[place] for place in places]

    def _next(self, length: int) -> tuple[Tensor, str]:
        """The next window, and its origin."""
        start, waiting = self._here.offset, self._waiting
        while sum(len(each.tokens) for each in waiting) - start < length + 1:
            waiting.append(next(self._arriving))
        parts, names, at = [], [], start
        for each in waiting:
            part = each.tokens[at : at + length + 1 - sum(map(len, parts))]
            if len(part):
                parts.append(part)
                names.append(each.name)
            at = max(at - len(each.tokens), 0)
        tokens = np.concatenate(parts)
        start += length
        while start >= len(waiting[0].tokens):
            start -= len(waiting.popleft().tokens)
        first = waiting[0].start
        self._here = Place(first.epoch, first.document, start, first.state)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return torch.from_numpy(tokens.astype(np.int64)), ", ".join(names[:3]) + more

    # ---- documents ---------------------------------------------------------------------------------------------------

    def _encoded(self, start: Place) -> Iterator[Encoded]:
        """The documents from a place on, encoded some at a time."""
        group, size = [], 0
        for place, document in self._documents(start):
            group.append((place, document))
            size += len(document.text)
            if size >= AT_ONCE:
                texts = self.tokenizer.encode_documents([document.text for _, document in group])
                yield from (Encoded(place, document.name, tokens)
                            for (place, document), tokens in zip(group, texts, strict=True))
                group, size = [], 0

    def _documents(self, start: Place) -> Iterator[tuple[Place, Document]]:
        """The documents from the one of a place on, epoch after epoch, each with the place of its first token."""
        from datasets.distributed import split_dataset_by_node

        rows = split_dataset_by_node(self.source.rows, rank=self.rank, world_size=self.num_processes)
        field, split = self.source.data.text_field, self.source.data.split
        epoch, number, state = start.epoch, start.document, start.state
        while True:
            empty = number == 0
            for row in self.source.guarded(rows_from(rows, epoch, state)):
                name = f"{split}#{number} of rank {self.rank}, epoch {epoch}"
                document = Document(name, text_of(row, field, f"{self.source.name}, {name}"))
                if document.text and hash_of(document) not in self.left_out:
                    empty = False
                    yield Place(epoch, number, 0, state), document
                state, number = rows.state_dict(), number + 1
            if empty:
                raise UserError(f"{self.source.name} has no text for rank {self.rank} of {self.num_processes} but the "
                                f"held-out documents; lower data.heldout_bytes, or start fewer processes")
            epoch, number, state = epoch + 1, 0, None


def rows_from(rows: Any, epoch: int, state: dict[str, Any] | None) -> Iterator[Any]:
    """The rows of an epoch of a streamed dataset after a state of it; None: all."""
    rows.set_epoch(epoch)
    if state is not None:
        rows.load_state_dict(state)
    yield from rows


def hash_of(document: Document) -> bytes:
    """A hash of a document's text."""
    return blake2b(document.text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
