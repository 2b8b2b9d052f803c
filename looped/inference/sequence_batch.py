"""Generated texts of unequal lengths in one tensor, and their ends.

A text ends at its end-of-text token, at the first of the `stop` strings, or at its last token. The rest of its row is
`NOTHING`, which is no token id, so code that forgets the ends fails instead of counting it.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from looped.devices import to_device
from looped.errors import UserError
from looped.tensor_types import Float, Int

NOTHING = -1

Texts = Int[Tensor, "num tokens"]

SLACK = 8
"""Tokens decoded beyond the bytes of a stop string to find it: the first of them may begin inside a character."""


@dataclass(frozen=True)
class Ending:
    """The end of a text: the token `end_of_text`, or the token with which `decode` of the text contains one of `stop`.
    Raises UserError for empty stop strings, and for stop strings without `decode`."""

    end_of_text: int | None = None
    stop: Sequence[str] = ()
    decode: Callable[[Sequence[int]], str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str) or not all(self.stop):
            raise UserError(f"stop {self.stop!r} is not a list of non-empty strings; give one such as ['END']")
        if self.stop and self.decode is None:
            raise UserError("stop strings are searched for in decoded text; pass decode=, such as tokenizer.decode")

    def reach(self, new: int) -> int:
        """The number of last tokens that decide if a text has ended, after `new` more tokens."""
        return new + max((len(stop.encode()) + SLACK for stop in self.stop), default=0)

    @property
    def never(self) -> bool:
        """True if no token ends a text."""
        return self.end_of_text is None and not self.stop

    def over(self, tails: Texts) -> list[bool]:
        """True for each text that has ended, by its last tokens (`reach`), for which the host waits."""
        return [self.end_of_text in row or self._stops(row) for row in tails.tolist()]

    def cut(self, texts: Texts) -> Texts:
        """The texts with `NOTHING` after their ends."""
        lengths = to_device(torch.tensor([self._length(row) for row in as_lists(texts)]), texts.device)
        place = torch.arange(texts.shape[1], device=texts.device)
        return texts.masked_fill(place >= lengths.unsqueeze(1), NOTHING)

    def _length(self, row: list[int]) -> int:
        """Number of tokens up to the first that ends the text, inclusive."""
        num = row.index(self.end_of_text) + 1 if self.end_of_text in row else len(row)
        if not self._stops(row[:num]):
            return num
        return bisect_left(range(num), True, key=lambda length: self._stops(row[:length]))

    def _stops(self, row: list[int]) -> bool:
        text = self.decode(row) if self.stop else ""
        return any(stop in text for stop in self.stop)

    def without_stop(self, text: str) -> str:
        """A text up to the first of the stop strings."""
        return text[: min((text.index(stop) for stop in self.stop if stop in text), default=len(text))]


def lengths_of(texts: Texts) -> Int[Tensor, "num"]:
    """Tokens of each text, its end of text included."""
    return (texts != NOTHING).sum(1)


def as_lists(texts: Texts) -> list[list[int]]:
    """The tokens of each text."""
    return [row[: len(row) - row.count(NOTHING)] for row in texts.tolist()]


def per_token(sums: Float[Tensor, "num"], counts: Int[Tensor, "num"]) -> Float[Tensor, "num"]:
    """One value per text, whose mean is total sums / total counts and whose spread is that of this ratio (to first
    order). If all texts have the same length, it is each text's own mean."""
    sums, counts = sums.double(), counts.double()
    ratio = sums.sum() / counts.sum().clamp(min=1)
    return ratio + (sums - ratio * counts) / counts.mean().clamp(min=1)
