"""Attention masks as objects: `allow(b, q, k)` is the definition, everything else is derived from it.

A mask is handed to `attention` as it is and brought to each backend's form there: SDPA's flag or tensor, flex's
`BlockMask`, xformers' `AttentionBias`. When queries are fewer than keys (a cache), they are the LAST rows: query r of
Lq stands at position Lk - Lq + r.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from looped.errors import UserError


@dataclass(frozen=True, eq=False)
class Mask:
    """Who may see whom. Rows that see nobody are answered with zeros by every backend."""

    def allow(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether query position q sees key position k in batch row b; index tensors that broadcast."""
        raise NotImplementedError

    @property
    def batch(self) -> int:
        """Batch rows the mask is made for; 1 means any."""
        return 1

    def dense(self, num_queries: int, num_keys: int, *,
              device: torch.device | str = "cpu") -> Bool[Tensor, "batch 1 queries keys"]:
        """The mask as a tensor: the oracle of every test, and SDPA's form where no flag says the same."""
        b = torch.arange(self.batch, device=device).view(-1, 1, 1, 1)
        q = torch.arange(num_keys - num_queries, num_keys, device=device).view(1, 1, -1, 1)
        k = torch.arange(num_keys, device=device).view(1, 1, 1, -1)
        return self.allow(b, q, k).expand(self.batch, 1, num_queries, num_keys)


@dataclass(frozen=True, eq=False)
class Full(Mask):
    """Everybody sees everybody.

    ```
    # # #
    # # #
    # # #
    ```
    """

    def allow(self, b, q, k):
        return torch.ones_like(b + q + k, dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class Causal(Mask):
    """Row i sees rows up to i.

    ```
    # . .
    # # .
    # # #
    ```
    """

    def allow(self, b, q, k):
        return (k <= q) | (b < 0)


@dataclass(frozen=True, eq=False)
class Padded(Mask):
    """Nobody sees padding; `valid` (B, L) is true for real keys. Here left-padded, causal:

    ```
    . . .
    . # .
    . # #
    ```
    """

    valid: Bool[Tensor, "batch length"]
    causal: bool = True

    @classmethod
    def from_lengths(cls, lengths: Int[Tensor, "batch"], length: int, *, side: str = "right",
                     causal: bool = True) -> "Padded":
        """Sequences of the given lengths in rows of `length`, padded on the `right` or the `left`."""
        if side not in ("right", "left"):
            raise UserError(f"padding side '{side}' is unknown; use 'right' or 'left'")
        lengths = torch.as_tensor(lengths)
        if lengths.min() < 0 or lengths.max() > length:
            raise UserError(f"lengths {lengths.tolist()} do not fit rows of {length}; "
                            f"pad to {int(lengths.max())} or more")
        places = torch.arange(length, device=lengths.device)
        if side == "left":
            places = places.flip(0)
        return cls(places < lengths.unsqueeze(1), causal)

    @property
    def batch(self) -> int:
        return self.valid.shape[0]

    def allow(self, b, q, k):
        seen = self.valid.to(k.device)[b, k]
        return seen & (k <= q) if self.causal else seen | (q < 0)


@dataclass(frozen=True, eq=False)
class Packed(Mask):
    """Several documents in one row; nobody sees another document. `documents` (B, L) numbers them, in runs.

    ```
    # . . .
    # # . .
    . . # .
    . . # #
    ```
    """

    documents: Int[Tensor, "batch length"]
    causal: bool = True

    @property
    def batch(self) -> int:
        return self.documents.shape[0]

    def allow(self, b, q, k):
        documents = self.documents.to(k.device)
        same = documents[b, q] == documents[b, k]
        return same & (k <= q) if self.causal else same

    def run_lengths(self) -> list[int]:
        """Lengths of the documents, row after row: xformers' form."""
        flat = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in self.documents]
        return [length for row in flat for length in row]


@dataclass(frozen=True, eq=False)
class CleanNoisy(Mask):
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

    length: int
    strict: bool = False

    def allow(self, b, q, k):
        noisy = q >= self.length
        own = q - self.length * noisy  # place of the row within its half
        clean_key = (k < self.length) & (k <= own - (noisy & self.strict).long())
        return (clean_key | (noisy & (k == q))) | (b < 0)
