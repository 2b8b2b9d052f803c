"""The base of all attention masks, and how masks combine: `a & b`, `a | b`, a table, some rows of a batch.

A mask of one's own is a subclass with `allow`; everything else is derived from it. The rows of a batch may differ in
it, and it may be changed after it was used:

    class FirstOf(Mask):
        def __init__(self, lengths):
            self.lengths = lengths

        def allow(self, q, k, b=0):
            return k < self.lengths[b]
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from looped.errors import UserError
from looped.nn.checks import kind_of
from looped.shapes import Bool, Int


class Mask:
    """An attention pattern. Rows that see nobody are answered with zeros by every backend, never with NaN.

    A mask may be changed between uses, with one exception: inside `torch.compile` the contents of its tensors count as
    constant, so there make a new mask instead.
    """

    @property
    def batch(self) -> int | None:
        """Batch rows the mask is made for; 1 means any, all alike; None (the default): any, and `allow` says whether
        they are alike."""
        return None

    @property
    def size(self) -> int | None:
        """Rows (keys) the mask is made for; None means any."""
        return None

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        """True if position q sees position k in batch row b; index tensors that broadcast."""
        raise NotImplementedError

    def check(self, batch: int, num_queries: int, num_keys: int) -> None:
        """Raise `UserError` where a batch of these sizes is not what the mask is made for."""
        if self.batch not in (None, 1, batch):
            raise UserError(f"the mask is made for {self.batch} rows, the batch has {batch}; make one for this batch")
        if self.size not in (None, num_keys):
            raise UserError(f"the mask is made for length {self.size}, the keys have {num_keys}; make one for them")
        if num_queries > num_keys:
            raise UserError(f"{num_queries} queries for {num_keys} keys: queries are the last rows of the keys, "
                            f"so there can be at most {num_keys}; the layout is (batch, length, heads, dim)")

    def dense(self, batch: int, num_queries: int, num_keys: int,
              device: torch.device | str = "cpu") -> Bool[Tensor, "batch 1 queries keys"]:
        """The mask as a tensor, with a batch of 1 where all rows are alike: the oracle of every test."""
        self.check(batch, num_queries, num_keys)
        b = torch.arange(self.batch or batch, device=device).view(-1, 1, 1, 1)
        q = torch.arange(num_keys - num_queries, num_keys, device=device).view(1, 1, -1, 1)
        k = torch.arange(num_keys, device=device).view(1, 1, 1, -1)
        allowed = self.ask(q, k, b)
        return allowed.expand(self.batch or allowed.shape[0], 1, num_queries, num_keys)

    def ask(self, q: Tensor, k: Tensor, b: Tensor) -> Bool[Tensor, "batch _ queries keys"]:
        """`allow` for index tensors of four axes. Raises `UserError` where it cannot be asked for many rows at once, or
        answers with something else than who sees whom."""
        name = type(self).__name__
        try:
            allowed = self.allow(q, k, b)
            shape = torch.broadcast_shapes(allowed.shape, (1, 1, 1, 1))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{name}.allow failed for {b.numel()} batch rows at once ({str(error).splitlines()[0]}); "
                            f"it is given index tensors that broadcast and must answer for each row") from error
        if allowed.dtype != torch.bool or shape[0] not in (1, len(b)):
            raise UserError(f"{name}.allow answered with {kind_of(allowed)} for {b.numel()} batch rows; it must answer "
                            f"true or false for each (q, k, b)")
        return allowed.expand(shape)

    def differs(self, device: torch.device | str = "cpu") -> bool:
        """True if the rows of a batch may differ: seen from the shape that `allow` answers with for two of them."""
        if self.batch is not None:
            return self.batch > 1
        return self.form(("differs", device), lambda: self._rows_asked(device) > 1)

    def _rows_asked(self, device: torch.device | str) -> int:
        first = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        return len(self.ask(first, first, first.expand(2, -1, -1, -1)))

    def of_rows(self, rows: Int[Tensor, "rows"]) -> "Mask":
        """The mask of some rows of its batch."""
        return self._of_rows(rows) if self.differs(rows.device) else self

    def _of_rows(self, rows: Int[Tensor, "rows"]) -> "Mask":
        return OfRows(self, rows)

    def form(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A backend's form of this mask: made on first use, kept as long as the mask stays as it is."""
        compiling = torch.compiler.is_compiling()  # which cannot trace what a stamp asks of a tensor
        stamp = None if compiling else self.stamp()
        known, forms = self.__dict__.get("_forms", (None, None))
        if forms is None or (known != stamp and not compiling):
            forms = {}
            self.__dict__["_forms"] = stamp, forms
        if key not in forms:
            forms[key] = make()
        return forms[key]

    def stamp(self) -> tuple[Any, ...]:
        """All that the mask is made of, for comparison: with each change, of a tensor in place too, it is another."""
        return tuple((name, _stamp(value)) for name, value in self.__dict__.items() if name != "_forms")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__.pop("_forms", None)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, makes its forms anew."""
        return {name: value for name, value in self.__dict__.items() if name != "_forms"}

    def __and__(self, other: "Mask") -> "Mask":
        return Both(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Either(self, other) if isinstance(other, Mask) else NotImplemented


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal to the very object alone. It holds the object, since another may come to live at a freed one's address."""

    object: Any

    def __eq__(self, other) -> bool:
        return isinstance(other, _Same) and self.object is other.object

    def __hash__(self) -> int:
        return id(self.object)


def _stamp(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Same(value), None if value.is_inference() else value._version
    if isinstance(value, Mask):
        return _Same(value), value.stamp()
    if isinstance(value, list | tuple):
        return tuple(map(_stamp, value))
    if isinstance(value, dict):
        return tuple((name, _stamp(each)) for name, each in value.items())
    return value.tobytes() if hasattr(value, "tobytes") else value  # numpy's arrays are changed in place as well


def as_mask(mask: Any) -> Mask:
    """A mask object as it is, and a bool tensor as a `Table`. Raises `UserError` for anything else, with the mask that
    says the same if there is one: numbers do not tell whether they are causal, and may be added to the scores."""
    if isinstance(mask, Mask):
        return mask
    wanted = "Full() lets everybody see everybody, Causal() is the mask of a language model"
    if isinstance(mask, Tensor):
        if mask.dtype == torch.bool:
            return Table(mask)
        wanted = ("make a tensor of transformers' kind (batch, length), 1 for a real token, a "
                  "Padded.of_attention_mask(tensor, causal=True or False), and scores to add a bool tensor")
    raise UserError(f"attention needs a mask object of looped.nn.bias or a bool tensor, got {kind_of(mask)}: {wanted}")


class _Pair(Mask):
    """Two masks of sizes that fit each other."""

    def __init__(self, first: Mask, second: Mask):
        self.first = first
        self.second = second
        for word, sizes in (("length", self._sizes), ("batch", self._batches)):
            if len(sizes) > 1:
                raise UserError(f"a mask made for a {word} of {sizes[0]} does not combine with one made for "
                                f"{sizes[1]}; make both for the same {word}")

    @property
    def _sizes(self) -> list[int]:
        return sorted({mask.size for mask in (self.first, self.second)} - {None})

    @property
    def _batches(self) -> list[int]:
        return sorted({mask.batch for mask in (self.first, self.second)} - {None, 1})

    @property
    def batch(self) -> int | None:
        return 1 if self.first.batch == self.second.batch == 1 else next(iter(self._batches), None)

    @property
    def size(self) -> int | None:
        return next(iter(self._sizes), None)

    def check(self, batch: int, num_queries: int, num_keys: int) -> None:
        """The demands of both."""
        self.first.check(batch, num_queries, num_keys)
        self.second.check(batch, num_queries, num_keys)

    def _seen(self, q: Tensor, k: Tensor, b: Tensor | int) -> tuple[Tensor, Tensor]:
        return tuple(mask.allow(q, k, 0 if mask.batch == 1 else b) for mask in (self.first, self.second))

    def _of_rows(self, rows):
        return type(self)(self.first.of_rows(rows), self.second.of_rows(rows))


class Both(_Pair):
    """`first & second`: a row sees whom both masks let it see."""

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        first, second = self._seen(q, k, b)
        return first & second


class Either(_Pair):
    """`first | second`: a row sees whom one of the masks lets it see."""

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        first, second = self._seen(q, k, b)
        return first | second


class OfRows(Mask):
    """Some rows of another mask's batch."""

    def __init__(self, mask: Mask, rows: Int[Tensor, "rows"]):
        self.mask = mask
        self.rows = rows

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int | None:
        return self.mask.size

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        return self.mask.allow(q, k, self.rows.to(k.device)[b])


class Table(Mask):
    """A bool tensor, true where a query sees a key: (queries, keys) for all rows of a batch, (batch, queries, keys), or
    torch's (batch, 1, queries, keys). The last query is the last key; fewer queries than the table's are its last."""

    def __init__(self, allowed: Bool[Tensor, "*batch queries keys"]):
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool or allowed.ndim not in (2, 3, 4) \
                or (allowed.ndim == 4 and allowed.shape[1] != 1):
            raise UserError(f"Table takes a bool tensor (queries, keys), (batch, queries, keys) or (batch, 1, queries, "
                            f"keys), true where a query sees a key; got {kind_of(allowed)}")
        self.allowed: Tensor = allowed.unsqueeze(0) if allowed.ndim == 2 else allowed.flatten(0, -3)  # B Lq Lk

    @property
    def batch(self) -> int:
        return len(self.allowed)

    @property
    def size(self) -> int:
        return self.allowed.shape[-1]

    def check(self, batch: int, num_queries: int, num_keys: int) -> None:
        """As for every mask, and no more queries than the table has."""
        super().check(batch, num_queries, num_keys)
        if num_queries > self.allowed.shape[1]:
            raise UserError(f"the table has {self.allowed.shape[1]} queries, not {num_queries}; make one for them")

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        allowed = self.allowed.to(k.device)
        return allowed[b, q - (allowed.shape[2] - allowed.shape[1]), k]
