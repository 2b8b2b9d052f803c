"""Windows of a token stream in an order that is a function of (seed, step) alone, so no loader state is saved.

The stream is cut into windows of length + 1 tokens at a stride of `length`, so that every token but the first is a
target once per epoch. Windows are reshuffled each epoch (see `looped.data.epoch_order`); row r of optimiser step s in
batches of B is item s * B + r of that endless sequence, for any micro-batch on any process.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looped.data.epoch_order import in_epochs
from looped.errors import UserError
from looped.tensor_types import Int

LONGER = "lower data.length, give more text, or change data.heldout"
"""The fix for a text that is too short for a sequence."""


class Placeless:
    """Training data whose batches are functions of (seed, step): there is no place to keep."""

    def place(self, step: int) -> Any:
        """State that a checkpoint keeps for this process to resume at `step`; None: nothing."""
        return None

    def go_to(self, places: Sequence[Any] | None, rank: int, num_processes: int) -> None:
        """Go on as process `rank` from the places of all processes in a checkpoint; None: from the beginning."""


class TokenStream(Placeless):
    """Documents as one array of token ids, each ended by `end_of_text`; `documents` are their names, in order.
    longer: the fix that an error offers if the text is too short."""

    def __init__(self, name: str, tokens: np.ndarray, *, end_of_text: int, documents: Sequence[str] = (),
                 longer: str = LONGER):
        self.name = name
        self.tokens = tokens
        self.end_of_text = end_of_text
        self.documents = documents
        self.longer = longer

    def __len__(self) -> int:
        return len(self.tokens)

    def windows(self, length: int) -> int:
        """The number of windows of length + 1 tokens; `UserError` if there is none."""
        count = (len(self) - 1) // length
        if count < 1:
            raise UserError(f"data.length {length} needs {length + 1} tokens, but the {self.name} text has {len(self)}"
                            f"; {self.longer}")
        return count

    def batch(self, step: int, *, batch_size: int, length: int, seed: int,
              rows: range | None = None) -> Int[Tensor, "rows length_and_one"]:
        """The given rows (all of them by default) of the batch of optimiser step `step`, counted from 0."""
        return self.gather(self.starts(items_of(step, batch_size, rows), length, seed=seed), length)

    def sequences(self, num: int, length: int) -> Int[Tensor, "num length_and_one"]:
        """`num` evenly spaced windows, the same on every call; if there are fewer, all of them, with a warning."""
        count = self.windows(length)
        if num > count:
            warnings.warn(f"{num} sequences are requested, but the {self.name} text has {count} of data.length "
                          f"{length}; all of them are used", stacklevel=2)
        return self.gather(self._spaced(num, length), length)

    def places(self, num: int, length: int) -> dict[str, list]:
        """Origins of the windows of `sequences`: `start`, the index of the first token in the stream; `document`, its
        document (None without names; an end-of-text token belongs to the document it ends); `offset`, its index in that
        document."""
        starts = self._spaced(num, length)
        ends = np.flatnonzero(self.tokens == self.end_of_text)
        numbers = np.searchsorted(ends, starts)
        begins = np.concatenate([[0], ends + 1])[numbers]
        names = [self.documents[number] if number < len(self.documents) else None for number in numbers]
        return {"document": names, "offset": (starts - begins).tolist(), "start": starts.tolist()}

    def describe(self, step: int, *, batch_size: int, length: int, seed: int, rows: range | None = None) -> list[str]:
        """One line per row of a batch: its range of tokens and the documents they are from."""
        starts = self.starts(items_of(step, batch_size, rows), length, seed=seed)
        numbers = range(batch_size) if rows is None else rows
        return [f"row {row}: {self.origin(start, length)}" for row, start in zip(numbers, starts.tolist(), strict=True)]

    def origin(self, start: int, length: int) -> str:
        """The range of tokens of the window from `start` on, and the documents they are from."""
        return f"{self.name} tokens {start}-{start + length}{self._names(start, start + length)}"

    def starts(self, items: Int[np.ndarray, "rows"], length: int, *, seed: int,
               stream: int = 0) -> Int[np.ndarray, "rows"]:
        """First tokens of the windows that are the given items of the endless sequence of epochs (`in_epochs`)."""
        return in_epochs(items, self.windows(length), seed=seed, stream=stream) * length

    def gather(self, starts: Int[np.ndarray, "rows"], length: int) -> Int[Tensor, "rows length_and_one"]:
        """The windows from the given tokens on."""
        index = starts[:, None] + np.arange(length + 1)  # B, L+1
        return torch.from_numpy(self.tokens[index].astype(np.int64))

    def _spaced(self, num: int, length: int) -> np.ndarray:
        """Indices of the first tokens of at most `num` evenly spaced windows."""
        count = self.windows(length)
        num = min(num, count)
        return np.arange(num) * count // num * length

    def _names(self, first: int, last: int) -> str:
        """The documents of tokens first ... last; an end-of-text token belongs to the document it ends."""
        if not self.documents:
            return ""
        ends = np.flatnonzero(self.tokens == self.end_of_text)
        low, high = np.searchsorted(ends, [first, last])
        names = self.documents[low : high + 1]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f" ({', '.join(names[:3])}{more})"


def shuffled(count: int, step: int, *, batch_size: int, seed: int,
             rows: Iterable[int] | None = None) -> Int[np.ndarray, "rows"]:
    """Indices below `count` for the given rows (all by default) of optimiser step `step`; each one once per epoch."""
    return in_epochs(items_of(step, batch_size, rows), count, seed=seed)


def items_of(step: int, batch_size: int, rows: Iterable[int] | None = None) -> Int[np.ndarray, "rows"]:
    """The numbers of the given rows (all by default) of optimiser step `step` among the rows of all steps."""
    return np.array(range(batch_size) if rows is None else list(rows), dtype=np.int64) + step * batch_size
