"""Attention masks as objects: `allow(q, k)` is the definition, everything else is derived from it.

A mask is handed to `attention` as it is and brought to each backend's form there, once for all layers and loop steps
that use the same object: SDPA's flag or tensor, flex's `BlockMask`, xformers' `AttentionBias`. When queries are fewer
than keys (a cache), they are the LAST rows: query r of Lq stands at position Lk - Lq + r. A mask of one's own is a
subclass with `allow`.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from looped.errors import UserError

Spans = list[list[tuple[int, int]]]  # for each batch row, the [start, stop) of each run of rows that see each other


class Mask:
    """Who may see whom. Rows that see nobody are answered with zeros by every backend, never with NaN."""

    @property
    def batch(self) -> int:
        """Batch rows the mask is made for; 1 means any."""
        return 1

    @property
    def size(self) -> int | None:
        """Rows (keys) the mask is made for; None means any."""
        return None

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        """Whether position q sees position k in batch row b; index tensors that broadcast."""
        raise NotImplementedError

    def check(self, batch: int, num_queries: int, num_keys: int) -> None:
        """Raise `UserError` where a batch of these sizes is not what the mask is made for."""
        if self.batch not in (1, batch):
            raise UserError(f"the mask is made for {self.batch} rows, the batch has {batch}; make one for this batch")
        if self.size not in (None, num_keys):
            raise UserError(f"the mask is made for length {self.size}, the keys have {num_keys}; make one for them")
        if num_queries > num_keys:
            raise UserError(f"{num_queries} queries for {num_keys} keys: queries are the last rows of the keys, "
                            f"so there can be at most {num_keys}")

    def dense(self, batch: int, num_queries: int, num_keys: int,
              device: torch.device | str = "cpu") -> Bool[Tensor, "batch 1 queries keys"]:
        """The mask as a tensor, with a batch of 1 where all rows are alike: the oracle of every test."""
        self.check(batch, num_queries, num_keys)
        b = torch.arange(self.batch, device=device).view(-1, 1, 1, 1)
        q = torch.arange(num_keys - num_queries, num_keys, device=device).view(1, 1, -1, 1)
        k = torch.arange(num_keys, device=device).view(1, 1, 1, -1)
        return self.allow(q, k, b).expand(self.batch, 1, num_queries, num_keys)

    def of_rows(self, rows: Int[Tensor, "rows"]) -> "Mask":
        """The mask of some rows of its batch."""
        if self.batch == 1:
            return self
        raise NotImplementedError

    def form(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A backend's form of this mask: made on first use, kept as long as the mask."""
        forms = self.__dict__.setdefault("_forms", {})
        if key not in forms:
            forms[key] = make()
        return forms[key]


@dataclass(frozen=True, eq=False)
class Full(Mask):
    """Everybody sees everybody; the one mask under which queries may outnumber keys.

    ```
    # # #
    # # #
    # # #
    ```
    """

    def check(self, batch: int, num_queries: int, num_keys: int) -> None:
        """Any sizes will do."""

    def allow(self, q, k, b=0):
        return torch.ones_like(q + k, dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class Causal(Mask):
    """Row i sees rows up to i. Right: two queries at the end of four keys.

    ```
    # . .      # # # .
    # # .      # # # #
    # # #
    ```
    """

    def allow(self, q, k, b=0):
        return k <= q


@dataclass(frozen=True, eq=False)
class Padded(Mask):
    """Real rows see real rows; padding sees nobody (its output is zero) and is seen by nobody.

    `lengths` counts each row's real tokens, padded on the `right` or the `left`; the left needs `width`, the padded
    length, too. Two real tokens of three, causal:

    ```
    # . .      . . .
    # # .      . # .
    . . .      . # #
    right      left
    ```
    """

    lengths: Int[Tensor, "batch"] | Sequence[int]
    side: str = "right"
    causal: bool = True
    width: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "lengths", torch.as_tensor(self.lengths))
        if self.side not in ("right", "left"):
            raise UserError(f"padding side '{self.side}' is unknown; use 'right' or 'left'")
        if self.side == "left" and self.width is None:
            raise UserError("padding on the left needs width, the padded length; pass width=tokens.shape[1]")
        object.__setattr__(self, "_longest", int(self.lengths.max()))
        if int(self.lengths.min()) < 0:
            raise UserError(f"lengths {self.lengths.tolist()} contain a negative one; give the number of real tokens")
        self._check_fit(self._longest if self.width is None else self.width)

    def _check_fit(self, width: int) -> None:
        if self._longest > width:
            raise UserError(f"a row of length {self._longest} does not fit the padded length {width}; "
                            f"pad to {self._longest} or more")

    def check(self, batch: int, num_queries: int, num_keys: int) -> None:
        """As for every mask, and the longest row must fit."""
        super().check(batch, num_queries, num_keys)
        self._check_fit(num_keys)

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def size(self) -> int | None:
        return self.width

    def allow(self, q, k, b=0):
        lengths = self.lengths.to(k.device)[b]
        if self.side == "right":
            real = (q < lengths) & (k < lengths)
        else:
            real = (q >= self.width - lengths) & (k >= self.width - lengths)
        return real & (k <= q) if self.causal else real

    def of_rows(self, rows):
        return replace(self, lengths=self.lengths[rows.to(self.lengths.device)])

    def spans(self, num_keys: int) -> Spans:
        lengths = self.lengths.tolist()
        return [[(0, n) if self.side == "right" else (num_keys - n, num_keys)] for n in lengths]


@dataclass(frozen=True, eq=False)
class Packed(Mask):
    """Several documents in one row; nobody sees another document. Documents of 2 and 2, causal:

    ```
    # . . .
    # # . .
    . . # .
    . . # #
    ```

    `documents` is either each row's document lengths, ((2, 2), ...), or a tensor (B, L) that numbers each position's
    document; a document is one unbroken run.
    """

    documents: Int[Tensor, "batch length"] | Sequence[Sequence[int]]
    causal: bool = True

    def __post_init__(self):
        if not isinstance(self.documents, Tensor):
            object.__setattr__(self, "documents", _number_documents(self.documents))
        if bool((self.documents.diff() >= 0).all()):  # numbers that never fall come back to nothing
            return
        for i, row in enumerate(self.documents):
            if len(row.unique()) < len(row.unique_consecutive()):
                raise UserError(f"row {i} of documents comes back to a document it had left; number each run anew")

    @property
    def batch(self) -> int:
        return self.documents.shape[0]

    @property
    def size(self) -> int:
        return self.documents.shape[1]

    def allow(self, q, k, b=0):
        documents = self.documents.to(k.device)
        same = documents[b, q] == documents[b, k]
        return same & (k <= q) if self.causal else same

    def of_rows(self, rows):
        return replace(self, documents=self.documents[rows.to(self.documents.device)])

    def spans(self, num_keys: int) -> Spans:
        stops = [row.unique_consecutive(return_counts=True)[1].cumsum(0).tolist() for row in self.documents]
        return [list(zip([0, *row[:-1]], row, strict=True)) for row in stops]


def _number_documents(lengths: Sequence[Sequence[int]]) -> Int[Tensor, "batch length"]:
    totals = [sum(row) for row in lengths]
    if len(set(totals)) != 1 or any(n < 1 for row in lengths for n in row):
        raise UserError(f"document lengths must be positive and add up to the same in each row; rows have {totals}")
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


@dataclass(frozen=True, eq=False)
class Within(Mask):
    """Another mask, within documents alone. `documents` (B, L) numbers each position's document; a mask of two halves
    of L rows, clean and noisy ones, has the same documents in both. Here `CleanNoisy` of documents of 1 and 2:

    ```
    # . . . . .
    . # . . . .
    . # # . . .
    # . . # . .
    . # . . # .
    . # # . . #
    ```
    """

    mask: Mask
    documents: Int[Tensor, "batch length"]

    @property
    def batch(self) -> int:
        return self.documents.shape[0]

    @property
    def size(self) -> int:
        return self.mask.size or self.documents.shape[1]

    def allow(self, q, k, b=0):
        documents, length = self.documents.to(k.device), self.documents.shape[1]
        return self.mask.allow(q, k, b) & (documents[b, q % length] == documents[b, k % length])

    def of_rows(self, rows):
        return replace(self, mask=self.mask.of_rows(rows), documents=self.documents[rows.to(self.documents.device)])


@dataclass(frozen=True, eq=False)
class Near(Mask):
    """A row sees the rows that stand at most `window` away on every axis. Places 0 ... 3 on one axis, window 1:

    ```
    # # . .
    # # # .
    . # # #
    . . # #
    ```

    places: (1 or B, L, A). lengths: real rows of each sequence, as in `Padded`; None where all are.
    """

    places: Int[Tensor, "batch length axes"]
    window: int
    lengths: Int[Tensor, "batch"] | None = None

    @property
    def batch(self) -> int:
        return len(self.places) if self.lengths is None else len(self.lengths)

    @property
    def size(self) -> int:
        return self.places.shape[1]

    def allow(self, q, k, b=0):
        places = self.places.to(k.device)
        row = b if len(places) > 1 else 0
        near = (places[row, q] - places[row, k]).abs().amax(-1) <= self.window
        if self.lengths is None:
            return near
        lengths = self.lengths.to(k.device)[b]
        return near & (q < lengths) & (k < lengths)

    def of_rows(self, rows):
        if self.batch == 1:
            return self
        return replace(self, places=self.places[rows] if len(self.places) > 1 else self.places,
                       lengths=None if self.lengths is None else self.lengths[rows])


@dataclass(frozen=True, eq=False)
class _TwoHalves(Mask):
    """L clean rows, then their L noisy copies."""

    length: int

    @property
    def size(self) -> int:
        return 2 * self.length

    def place(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(whether a row is noisy, its place within its half)."""
        noisy = rows >= self.length
        return noisy, rows - self.length * noisy


@dataclass(frozen=True, eq=False)
class CleanNoisy(_TwoHalves):
    """2L rows: L clean ones, then their L noisy copies. Clean rows are causal; noisy row i sees clean rows up to i
    (`strict`: before i) and itself. Here L = 2:

    ```
    # . . .        # . . .
    # # . .        # # . .
    # . # .        . . # .
    # # . #        # . . #    (strict)
    ```

    Not strict: noisy row i holds the noised token i + 1, as in this package. Strict: it holds the noised token i, the
    order of DiffusionBlocks and Block Diffusion. `attention` never builds the 2L x 2L tensor.
    """

    strict: bool = False

    def allow(self, q, k, b=0):
        noisy, own = self.place(q)
        clean_key = (k < self.length) & (k <= own - (noisy & self.strict).long())
        return clean_key | (noisy & (k == q))


@dataclass(frozen=True, eq=False)
class CleanNoisyBlocks(_TwoHalves):
    """L clean rows and their L noisy copies, which are sought in blocks of `block`: clean rows are causal; a noisy row
    sees its whole block, and the clean rows up to its block's first. Here L = 4 and blocks of 2; `attention` may be
    given the noisy queries alone, the last L rows:

    ```
    # . . .  . . . .
    # # . .  . . . .
    # # # .  . . . .
    # # # #  . . . .

    # . . .  # # . .
    # . . .  # # . .
    # # # .  . . # #
    # # # .  . . # #
    ```

    Noisy row i holds the noised token i + 1, so the clean rows that a block sees are all the tokens before its own.
    """

    block: int

    def __post_init__(self):
        if self.block < 1 or self.length % self.block:
            raise UserError(f"{self.length} rows do not split into blocks of {self.block}; "
                            f"try a length of {max(1, self.length // self.block) * self.block}")

    def allow(self, q, k, b=0):
        noisy, own = self.place(q)
        last = torch.where(noisy, own // self.block * self.block, own)
        same_block = (k >= self.length) & ((k - self.length) // self.block == own // self.block)
        return ((k < self.length) & (k <= last)) | (noisy & same_block)
