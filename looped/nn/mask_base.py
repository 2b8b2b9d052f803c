"""Base class of attention masks, and their combinations: `a & b`, `a | b`, a table, some sequences of a batch.

A custom mask is a subclass with `allow`; everything else is derived from it. It may differ between the sequences of a
batch, and it may be changed after use:

    class FirstOf(Mask):
        def __init__(self, lengths):
            self.lengths = lengths

        def allow(self, q, k, b=0):
            return k < self.lengths[b]
"""

import copy
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from looped.devices import to_device
from looped.errors import UserError, one_line
from looped.nn.checks import kind_of
from looped.tensor_types import Bool, Int


class Mask:
    """An attention pattern. Every backend returns zeros, never NaN, for rows that may attend to no key.

    A mask may be changed between uses, except inside `torch.compile`, which takes the contents of its tensors as
    constant; make a new mask there. `allow` should read attributes of the mask alone: numbers, tensors, arrays, lists,
    dicts and masks are compared at each use. With any other object as an attribute the mask is brought to its form
    anew at each use, which takes time; a change of what `allow` reads elsewhere, such as a variable around its class,
    goes unseen.
    """

    @property
    def batch(self) -> int | None:
        """Batch size the mask is made for; 1: any, all sequences alike; None (default): any, and the shape that `allow`
        returns decides if they are alike."""
        return None

    @property
    def size(self) -> int | None:
        """Number of keys the mask is made for; None means any."""
        return None

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        """True if position q attends to position k in sequence b; the arguments are index tensors that broadcast."""
        raise UserError(f"{type(self).__name__} does not say who attends to whom; define its allow(q, k, b=0), which "
                        f"returns a bool tensor: true if position q attends to position k in sequence b")

    def check(self, batch: int, num_queries: int, num_keys: int) -> None:
        """Raise `UserError` if the mask is not made for these sizes."""
        if self.batch not in (None, 1, batch):
            raise UserError(f"the mask is made for {self.batch} sequences, the batch has {batch}; make one for "
                            f"this batch")
        if self.size not in (None, num_keys):
            raise UserError(f"the mask is made for length {self.size}, the keys have {num_keys}; make one of length "
                            f"{num_keys}")
        if num_queries > num_keys:
            raise UserError(f"{num_queries} queries for {num_keys} keys: queries are the last rows of the keys, "
                            f"so there can be at most {num_keys}; the layout is (batch, length, heads, dim)")

    def dense(self, batch: int, num_queries: int, num_keys: int,
              device: torch.device | str = "cpu") -> Bool[Tensor, "batch 1 queries keys"]:
        """The mask as a tensor, with a batch of 1 if all sequences are alike; the reference of every test."""
        self.check(batch, num_queries, num_keys)
        b = torch.arange(self.batch or batch, device=device).view(-1, 1, 1, 1)
        q = torch.arange(num_keys - num_queries, num_keys, device=device).view(1, 1, -1, 1)
        k = torch.arange(num_keys, device=device).view(1, 1, 1, -1)
        allowed = self.ask(q, k, b)
        return allowed.expand(self.batch or allowed.shape[0], 1, num_queries, num_keys)

    def ask(self, q: Tensor, k: Tensor, b: Tensor) -> Bool[Tensor, "batch _ queries keys"]:
        """`allow` for index tensors of four axes. Raises `UserError` if it fails for many sequences at once, or returns
        anything but one bool per pair."""
        name = type(self).__name__
        try:
            allowed = self.allow(q, k, b)
            shape = torch.broadcast_shapes(allowed.shape, (1, 1, 1, 1))
        except UserError:
            raise
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{name}.allow failed for {b.numel()} sequences at once ({one_line(error)}); "
                            f"it gets index tensors that broadcast and must answer for each sequence") from error
        if allowed.dtype != torch.bool or shape[0] not in (1, len(b)):
            raise UserError(f"{name}.allow returned {kind_of(allowed)} for {b.numel()} sequences; it must return true "
                            f"or false for each (q, k, b)")
        return allowed.expand(shape)

    def differs(self, device: torch.device | str = "cpu") -> bool:
        """True if the sequences of a batch may differ, by the shape that `allow` returns for two of them."""
        if self.batch is not None:
            return self.batch > 1
        return self.form(("differs", device), lambda: self._rows_asked(device) > 1)

    def _rows_asked(self, device: torch.device | str) -> int:
        first = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        return len(self.ask(first, first, first.expand(2, -1, -1, -1)))

    def of_rows(self, rows: Int[Tensor, "rows"]) -> "Mask":
        """The mask of some sequences of its batch."""
        return self._of_rows(rows) if self.differs(rows.device) else self

    def _of_rows(self, rows: Int[Tensor, "rows"]) -> "Mask":
        return OfRows(self, rows)

    def on(self, device: torch.device | str) -> "Mask":
        """A copy that holds its tensors on `device`, those of the masks that it is made of too."""
        other = copy.copy(self)
        other.__dict__.update((name, value.to(device) if isinstance(value, Tensor) else value.on(device))
                              for name, value in self.__dict__.items() if isinstance(value, Tensor | Mask))
        return other

    def form(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A backend's form of this mask: built on first use, cached until the mask changes."""
        compiling = torch.compiler.is_compiling()  # dynamo cannot trace what a stamp reads from a tensor
        stamp = None if compiling else self.stamp()
        known, forms = self.__dict__.get("_forms", (None, None))
        if forms is None or (known != stamp and not compiling):
            forms = {}
            self.__dict__["_forms"] = stamp, forms
        if key not in forms:
            # A tensor made under inference_mode could not be saved for backward by a later use.
            leave = torch.is_inference_mode_enabled() and not compiling
            with torch.inference_mode(False) if leave else nullcontext():
                forms[key] = make()
        return forms[key]

    def stamp(self) -> tuple[Any, ...]:
        """Comparable summary of the mask's contents; it changes with every change, in-place changes of tensors too."""
        return tuple((name, _stamp(value)) for name, value in self.__dict__.items() if name != "_forms")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__.pop("_forms", None)

    def __getstate__(self) -> dict[str, Any]:
        """State without the cached forms: a copy or a pickle rebuilds them."""
        return {name: value for name, value in self.__dict__.items() if name != "_forms"}

    def __and__(self, other: "Mask") -> "Mask":
        return Both(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Either(self, other) if isinstance(other, Mask) else NotImplemented


@dataclass(frozen=True, eq=False)
class _Same:
    """Equality by identity. It holds the object, since a new object may get the address of a freed one."""

    object: Any

    def __eq__(self, other) -> bool:
        return isinstance(other, _Same) and self.object is other.object

    def __hash__(self) -> int:
        return id(self.object)


class _Content:
    """Equality by content, of a copy: a tensor of `torch.inference_mode` does not count its changes. So every call of
    attention compares it; a mask that is made before, or under `torch.no_grad`, costs nothing."""

    def __init__(self, tensor: Tensor):
        self.copy = tensor.clone()

    def __eq__(self, other) -> bool:
        if not isinstance(other, _Content) or self.copy.dtype != other.copy.dtype:
            return False
        return self.copy.device == other.copy.device and torch.equal(self.copy, other.copy)


UNCHANGING = (bool, int, float, complex, str, bytes, range, type, FunctionType, torch.dtype, torch.device)
"""Types of attributes that are compared by themselves."""


def _stamp(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Content(value) if value.is_inference() else (_Same(value), value._version)
    if isinstance(value, Mask):
        return _Same(value), value.stamp()
    if isinstance(value, list | tuple):
        return tuple(map(_stamp, value))
    if isinstance(value, dict):
        return tuple((name, _stamp(each)) for name, each in value.items())
    if hasattr(value, "tobytes"):
        return value.tobytes()  # numpy arrays can change in place too
    return value if value is None or isinstance(value, UNCHANGING) else object()  # which equals nothing else


def as_mask(mask: Any) -> Mask:
    """A mask object unchanged, a bool tensor as a `Table`. Raises `UserError` for anything else, naming the equivalent
    mask: a tensor of numbers does not say if it is causal, or if it is to be added to the scores."""
    if isinstance(mask, Mask):
        return mask
    wanted = "Full() lets every row attend to every row, Causal() is the mask of a language model"
    if isinstance(mask, Tensor):
        if mask.dtype == torch.bool:
            return Table(mask)
        wanted = ("convert transformers' attention_mask (batch, length), 1 for a real token, by "
                  "Padded.of_attention_mask(tensor, causal=True or False), and additive scores to a bool tensor")
    raise UserError(f"attention needs a mask object of looped.nn.masks or a bool tensor, got {kind_of(mask)}: {wanted}")


class _Pair(Mask):
    """Two masks of compatible sizes."""

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
        """Raise `UserError` if either mask is not made for these sizes."""
        self.first.check(batch, num_queries, num_keys)
        self.second.check(batch, num_queries, num_keys)

    def _seen(self, q: Tensor, k: Tensor, b: Tensor | int) -> tuple[Tensor, Tensor]:
        return tuple(mask.allow(q, k, 0 if mask.batch == 1 else b) for mask in (self.first, self.second))

    def _of_rows(self, rows):
        return type(self)(self.first.of_rows(rows), self.second.of_rows(rows))


class Both(_Pair):
    """`first & second`: the pairs that both masks allow."""

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        first, second = self._seen(q, k, b)
        return first & second


class Either(_Pair):
    """`first | second`: the pairs that at least one mask allows."""

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        first, second = self._seen(q, k, b)
        return first | second


class OfRows(Mask):
    """Some sequences of another mask's batch."""

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
        return self.mask.allow(q, k, to_device(self.rows, k.device)[b])


class Table(Mask):
    """Mask from a bool tensor, true if a query attends to a key: (queries, keys) for all sequences of a batch, (batch,
    queries, keys), or torch's (batch, 1, queries, keys). The last query is at the last key; a call with fewer queries
    uses the table's last ones."""

    def __init__(self, allowed: Bool[Tensor, "*batch queries keys"]):
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool or allowed.ndim not in (2, 3, 4) \
                or (allowed.ndim == 4 and allowed.shape[1] != 1):
            raise UserError(f"Table takes a bool tensor (queries, keys), (batch, queries, keys) or (batch, 1, queries, "
                            f"keys), true if a query attends to a key; got {kind_of(allowed)}")
        self.allowed: Tensor = allowed.unsqueeze(0) if allowed.ndim == 2 else allowed.flatten(0, -3)  # B Lq Lk

    @property
    def batch(self) -> int:
        return len(self.allowed)

    @property
    def size(self) -> int:
        return self.allowed.shape[-1]

    def check(self, batch: int, num_queries: int, num_keys: int) -> None:
        """Raise `UserError` if the sizes do not fit the mask, or if there are more queries than in the table."""
        super().check(batch, num_queries, num_keys)
        if num_queries > self.allowed.shape[1]:
            raise UserError(f"the table has {self.allowed.shape[1]} queries, not {num_queries}; make one with "
                            f"{num_queries}")

    def allow(self, q: Tensor, k: Tensor, b: Tensor | int = 0) -> Tensor:
        allowed = to_device(self.allowed, k.device)
        return allowed[b, q - (allowed.shape[2] - allowed.shape[1]), k]
