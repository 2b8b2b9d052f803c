"""Windows of several token streams in given proportions: one side of the text of a mixture.

Training sequence n is of the source whose turn it is (`Quotas`), and there the next window of that source's own epochs.
Both are functions of (seed, n), so no loader state is saved. Of a single source the order is that of `TokenStream`.
"""

import warnings
from collections.abc import Iterable, Mapping
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from looped.data.quotas import Quotas
from looped.data.token_windows import Placeless, TokenStream, items_of
from looped.tensor_types import Int


class MixedStream(Placeless):
    """Streams by the names of their sources, in alphabetical order, with their shares of the sequences, which add up to
    1."""

    def __init__(self, name: str, parts: Mapping[str, TokenStream], shares: Mapping[str, Fraction]):
        self.name = name
        self.parts = parts
        self.shares = shares
        self.quotas: Quotas = Quotas([shares[each] for each in parts])

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    @property
    def end_of_text(self) -> int:
        """The token that ends a document, the same in all sources."""
        return next(iter(self.parts.values())).end_of_text

    # ---- training ----------------------------------------------------------------------------------------------------

    def batch(self, step: int, *, batch_size: int, length: int, seed: int,
              rows: range | None = None) -> Int[Tensor, "rows length_and_one"]:
        """The given rows (all of them by default) of the batch of optimiser step `step`, counted from 0."""
        sources, starts = self.drawn(items_of(step, batch_size, rows), length, seed)
        tokens = torch.empty(len(sources), length + 1, dtype=torch.long)
        for number, part in enumerate(self.parts.values()):
            here = sources == number
            tokens[here] = part.gather(starts[here], length)
        return tokens

    def describe(self, step: int, *, batch_size: int, length: int, seed: int, rows: range | None = None) -> list[str]:
        """One line per row of a batch: its source, its range of tokens there and the documents they are from."""
        sources, starts = self.drawn(items_of(step, batch_size, rows), length, seed)
        names = list(self.parts)
        return [f"row {row}: {names[source]}, {self.parts[names[source]].origin(start, length)}"
                for row, source, start in zip(range(batch_size) if rows is None else rows, sources.tolist(),
                                              starts.tolist(), strict=True)]

    def drawn(self, numbers: Int[np.ndarray, "rows"], length: int, seed: int) -> tuple[Int[np.ndarray, "rows"],
                                                                                        Int[np.ndarray, "rows"]]:
        """The source of each sequence, and the first token of its window there."""
        sources, items = self.quotas.turns(numbers, seed)
        starts = np.empty_like(items)
        for number, part in enumerate(self.parts.values()):
            here = sources == number
            starts[here] = part.starts(items[here], length, seed=seed, stream=number)
        return sources, starts

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def windows(self, length: int) -> int:
        """The most sequences that `sequences` can give without changing the sources' shares, or without leaving one
        out. Raises UserError if a source has none."""
        each = [part.windows(length) for part in self.parts.values()]
        return max(len(each), min(num // share for num, share in zip(each, self.shares.values(), strict=True)))

    def allotted(self, num: int) -> dict[str, int]:
        """Number of sequences of each source out of `num`: by the shares, rounded, at least one if there are enough.
        """
        counts = dict(zip(self.parts, self.quotas.before([num])[0].tolist(), strict=True))
        for name in [name for name, count in counts.items() if not count and num >= len(counts)]:
            counts[max(counts, key=lambda each: counts[each])] -= 1
            counts[name] = 1
        return counts

    def sequences(self, num: int, length: int) -> Int[Tensor, "num length_and_one"]:
        """`num` windows, evenly spaced in each source, the sources in turn, the same on every call; if the shares allow
        fewer, those, with a warning."""
        if num > (count := self.windows(length)):
            warnings.warn(f"{num} sequences are requested, but the {self.name} text has {count} of data.length "
                          f"{length} in the proportions of the mixture; these are used", stacklevel=2)
        each = [self.parts[name].sequences(part, length) for name, part in self._given(num, length).items()]
        return torch.cat(each)[self._interleaved(num, length)]

    def places(self, num: int, length: int) -> dict[str, list]:
        """Origins of the windows of `sequences`: `source`, and the columns of `TokenStream.places` within it."""
        given = self._given(num, length)
        each = [self.parts[name].places(part, length) | {"source": [name] * part} for name, part in given.items()]
        joined = {column: [value for part in each for value in part[column]] for column in each[0]}
        return {column: [values[row] for row in self._interleaved(num, length)] for column, values in joined.items()}

    def rows_of(self, name: str, num: int, length: int) -> Int[Tensor, "rows"]:
        """The rows of `sequences` that are of a source."""
        places = self.places(num, length)["source"]
        return torch.tensor([row for row, source in enumerate(places) if source == name], dtype=torch.long)

    def _given(self, num: int, length: int) -> dict[str, int]:
        return {name: count for name, count in self.allotted(min(num, self.windows(length))).items() if count}

    def _interleaved(self, num: int, length: int) -> Iterable[int]:
        """The order of sequences that are listed source by source, so that each part of it has all sources."""
        turns = np.concatenate([(np.arange(count) + 0.5) / count for count in self._given(num, length).values()])
        return np.argsort(turns, kind="stable").tolist()
