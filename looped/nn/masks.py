"""Attention masks as objects: `allow(q, k)` is the definition, everything else is derived from it.

`attention` converts a mask to the backend's form (SDPA's flag or tensor, flex's `BlockMask`, xformers'
`AttentionBias`), once for all layers and loop steps that use the same object. If there are fewer queries than keys (a
cache), the queries are the LAST rows: query r of Lq is at position Lk - Lq + r. A custom mask is a subclass of `Mask`
with `allow`; masks combine by `&` and `|` (see mask.py). In the pictures, lines are queries, columns are keys, and #
is an allowed pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from looped.devices import to_device
from looped.errors import UserError
from looped.nn.checks import WHOLE, kind_of
from looped.nn.mask_base import Mask
from looped.tensor_types import Int, Shaped

Spans = list[list[tuple[int, int]]]  # per sequence, the [start, stop) of each run of rows that attend to each other


@dataclass(frozen=True, eq=False)
class Full(Mask):
    """Every row attends to every row; the only mask that allows more queries than keys.

    ```
    # # #
    # # #
    # # #
    ```
    """

    def check(self, batch: int, num_queries: int, num_keys: int) -> None:
        """Accept any sizes."""

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        return torch.ones_like(q + k, dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class Causal(Mask):
    """Row i attends to rows up to i. Right: two queries at the end of four keys.

    ```
    # . .      # # # .
    # # .      # # # #
    # # #
    ```
    """

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        return k <= q


@dataclass(frozen=True, eq=False)
class SlidingWindow(Mask):
    """Row i attends to itself and the `width - 1` rows before it (Beltagy et al. 2020, arXiv 2004.05150). Width 2:

    ```
    # . . .
    # # . .
    . # # .
    . . # #
    ```
    """

    width: int

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"a sliding window of {self.width} rows contains no row; give a width of 1 (the row "
                            f"itself) or more")

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        return (k <= q) & (q - k < self.width)


@dataclass(frozen=True, eq=False)
class Padded(Mask):
    """Real rows attend to real rows; padding attends to nothing (its output is zero), and no row attends to it.

    `lengths`: real tokens per sequence, padded on the `right` or the `left`; `left` also needs `width`, the padded
    length. Two real tokens of three, causal:

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", _whole_numbers("lengths", self.lengths, "batch"))
        if self.side not in ("right", "left"):
            raise UserError(f"padding side '{self.side}' is unknown; use 'right' or 'left'")
        if self.side == "left" and self.width is None:
            raise UserError("padding on the left needs width, the padded length; pass width=tokens.shape[1]")
        object.__setattr__(self, "_longest", int(self.lengths.max()))
        if int(self.lengths.min()) < 0:
            raise UserError(f"lengths {self.lengths.tolist()} contain a negative number; give the number of real "
                            f"tokens of each sequence")
        self._check_fit(self._longest if self.width is None else self.width)

    @classmethod
    def of_attention_mask(cls, mask: Shaped[Tensor, "batch length"], *, causal: bool = True) -> "Padded":
        """The padding of transformers' `attention_mask`: 1 or true for a real token, all zeros on one side. Raises
        UserError for any other pattern."""
        if not isinstance(mask, Tensor) or mask.ndim != 2 or not bool(((mask == 0) | (mask == 1)).all()):
            raise UserError("an attention_mask is a tensor (batch, length) of ones (real tokens) and zeros (padding)")
        lengths, width = mask.bool().sum(1), mask.shape[1]
        for side in ("right", "left"):
            padded = cls(lengths, side=side, causal=causal, width=width)
            rows = torch.arange(width, device=mask.device)
            row = torch.arange(len(mask), device=mask.device)
            if torch.equal(replace(padded, causal=False).allow(rows, rows, row.unsqueeze(1)), mask.bool()):
                return padded
        raise UserError("this attention_mask has padding between real tokens, or on the left in some sequences and on "
                        "the right in others; pad all sequences on one side, or pass the allowed pairs as a Table")

    def _check_fit(self, width: int) -> None:
        if self._longest > width:
            raise UserError(f"a sequence of length {self._longest} does not fit the padded length {width}; "
                            f"pad to {self._longest} or more")

    def check(self, batch: int, num_queries: int, num_keys: int) -> None:
        """Raise `UserError` if the sizes do not fit the mask or the longest sequence."""
        super().check(batch, num_queries, num_keys)
        self._check_fit(num_keys)

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def size(self) -> int | None:
        return self.width

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        lengths = to_device(self.lengths, k.device)[b]
        if self.side == "right":
            real = (q < lengths) & (k < lengths)
        else:
            real = (q >= self.width - lengths) & (k >= self.width - lengths)
        return real & (k <= q) if self.causal else real

    def _of_rows(self, rows):
        return replace(self, lengths=self.lengths[to_device(rows, self.lengths.device)])

    def spans(self, num_keys: int) -> Spans:
        lengths = self.lengths.tolist()
        return [[(0, n) if self.side == "right" else (num_keys - n, num_keys)] for n in lengths]


@dataclass(frozen=True, eq=False)
class Packed(Mask):
    """Documents packed into one sequence; rows attend within their document. Documents of 2 and 2, causal:

    ```
    # . . .
    # # . .
    . . # .
    . . # #
    ```

    `documents`: the document lengths of each sequence, ((2, 2), ...), or a tensor (B, L) with the document number of
    each position; a document is one contiguous run.
    """

    documents: Int[Tensor, "batch length"] | Sequence[Sequence[int]]
    causal: bool = True

    def __post_init__(self) -> None:
        given = self.documents if isinstance(self.documents, Tensor) else _number_documents(self.documents)
        object.__setattr__(self, "documents", _whole_numbers("documents", given, "batch, length"))
        if bool((self.documents.diff() >= 0).all()):  # numbers that never fall repeat no earlier document
            return
        for i, row in enumerate(self.documents):
            if len(row.unique()) < len(row.unique_consecutive()):
                raise UserError(f"row {i} of documents returns to an earlier document; give each run its own number")

    @property
    def batch(self) -> int:
        return self.documents.shape[0]

    @property
    def size(self) -> int:
        return self.documents.shape[1]

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        documents = to_device(self.documents, k.device)
        same = documents[b, q] == documents[b, k]
        return same & (k <= q) if self.causal else same

    def _of_rows(self, rows):
        return replace(self, documents=self.documents[to_device(rows, self.documents.device)])

    def spans(self, num_keys: int) -> Spans:
        stops = [row.unique_consecutive(return_counts=True)[1].cumsum(0).tolist() for row in self.documents]
        return [list(zip([0, *row[:-1]], row, strict=True)) for row in stops]


def _whole_numbers(name: str, given: Tensor | Sequence, axes: str) -> Tensor:
    """The given numbers: of int32 and int64 the same tensor, whose changes are seen, of smaller integers, whose
    differences wrap around, an int64 copy. Raises UserError unless they are integers with these axes."""
    try:
        numbers = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} must be whole numbers ({axes}), got {given}") from error
    if numbers.ndim != len(axes.split(",")) or not numbers.numel() or numbers.dtype not in WHOLE:
        raise UserError(f"{name} must be whole numbers ({axes}), got {kind_of(numbers)}"
                        + ("; convert transformers' attention_mask by Padded.of_attention_mask(mask)"
                           if name == "lengths" and numbers.ndim == 2 else ""))
    return numbers if numbers.dtype.itemsize >= 4 else numbers.long()


def _number_documents(lengths: Sequence[Sequence[int]]) -> Int[Tensor, "batch length"]:
    totals = [sum(row) for row in lengths]
    if len(set(totals)) != 1 or any(n < 1 for row in lengths for n in row):
        raise UserError(f"document lengths must be positive and have the same sum in each row; rows have {totals}")
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


@dataclass(frozen=True, eq=False)
class SameDocument(Mask):
    """Rows attend within their document, for use with another mask. `CleanNoisy(3) & SameDocument(documents)` with
    documents of 1 and 2 is

    ```
    # . . . . .
    . # . . . .
    . # # . . .
    # . . # . .
    . # . . # .
    . # # . . #
    ```

    `documents` (B, L): the document number of each position, used for both halves of L rows, clean and noisy.
    """

    documents: Int[Tensor, "batch length"]

    @property
    def batch(self) -> int:
        return self.documents.shape[0]

    def check(self, batch: int, num_queries: int, num_keys: int) -> None:
        """Raise `UserError` if the keys are neither the L rows of the documents nor two halves of L."""
        super().check(batch, num_queries, num_keys)
        length = self.documents.shape[1]
        if num_keys not in (length, 2 * length):
            raise UserError(f"SameDocument numbers {length} positions, for {length} keys or two halves of {length}, "
                            f"and there are {num_keys}; give documents of length {num_keys}")

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        documents, length = to_device(self.documents, k.device), self.documents.shape[1]
        return documents[b, q % length] == documents[b, k % length]

    def _of_rows(self, rows):
        return replace(self, documents=self.documents[to_device(rows, self.documents.device)])


@dataclass(frozen=True, eq=False)
class Near(Mask):
    """Local attention: to rows at most `window` away on every axis (Chebyshev). Places 0 ... 3 on one axis, window 1:

    ```
    # # . .
    # # # .
    . # # #
    . . # #
    ```

    places: (1 or B, L, A). lengths: real rows of each sequence, as in `Padded`; None if all are real.
    """

    places: Int[Tensor, "one_or_batch length axes"]
    window: int
    lengths: Int[Tensor, "batch"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", _whole_numbers("places", self.places, "one or batch, length, axes"))
        if self.lengths is not None and len(self.places) not in (1, len(self.lengths)):
            raise UserError(f"Near has places for {len(self.places)} sequences and lengths for {len(self.lengths)}; "
                            f"give places for 1 or {len(self.lengths)}")

    @property
    def batch(self) -> int:
        return len(self.places) if self.lengths is None else len(self.lengths)

    @property
    def size(self) -> int:
        return self.places.shape[1]

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        places = to_device(self.places, k.device)
        row = b if len(places) > 1 else 0
        near = (places[row, q] - places[row, k]).abs().amax(-1) <= self.window
        if self.lengths is None:
            return near
        lengths = to_device(self.lengths, k.device)[b]
        return near & (q < lengths) & (k < lengths)

    def _of_rows(self, rows):
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
        """(True if a row is noisy, its place within its half)."""
        noisy = rows >= self.length
        return noisy, rows - self.length * noisy


@dataclass(frozen=True, eq=False)
class CleanNoisy(_TwoHalves):
    """2L rows: L clean ones, then their L noisy copies. Clean rows are causal; noisy row i attends to clean rows
    up to i (`strict`: before i) and to itself. Here L = 2:

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

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        noisy, own = self.place(q)
        clean_key = (k < self.length) & (k <= own - (noisy & self.strict).long())
        return clean_key | (noisy & (k == q))


@dataclass(frozen=True, eq=False)
class CleanNoisyBlocks(_TwoHalves):
    """L clean rows, then their L noisy copies, which are predicted in blocks of `block`.

    Clean rows are causal; a noisy row attends to its whole block and to the clean rows up to the first row of its
    block. Here L = 4 with blocks of 2; `attention` also takes the noisy queries alone, the last L rows:

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

    Noisy row i holds the noised token i + 1, so the clean rows that a block attends to are all the tokens before its
    own.
    """

    block: int

    def __post_init__(self) -> None:
        if self.block < 1 or self.length % self.block:
            raise UserError(f"{self.length} rows do not split into blocks of {self.block}; "
                            f"try a length of {max(1, self.length // self.block) * self.block}")

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        noisy, own = self.place(q)
        last = torch.where(noisy, own // self.block * self.block, own)
        same_block = (k >= self.length) & ((k - self.length) // self.block == own // self.block)
        return ((k < self.length) & (k <= last)) | (noisy & same_block)
