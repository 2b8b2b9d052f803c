"""KV cache of a looped model: a tree over loop steps and layers, each created on first use.

A path names a place: `cache.child("core", 3).layer(0)` is layer 0 of loop step 3. Nothing is sized in advance, so the
number of loop or solver steps is free at call time.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Path = tuple[Hashable, ...]


SMALL = 2**15
"""Numbers that the processor copies in less time than the calls of a write in place take."""


class LayerCache:
    """Keys and values (B, M, G, K) of one layer.

    Without gradients, rows are written in place behind those that are there, into memory that doubles when it is full,
    so a text of n tokens copies about 2 n rows in all. New tensors are made by appends with gradients, since the
    backward pass needs the old ones, and on the processor as long as they are `SMALL`. Rows that were forgotten
    (`truncate`) are overwritten, in tensors returned before too.
    """

    def __init__(self, k: Tensor | None = None, v: Tensor | None = None):
        self.k: Tensor | None = k
        self.v: Tensor | None = v
        self._memory: list[Tensor] = []

    @property
    def length(self) -> int:
        return 0 if self.k is None else self.k.shape[1]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows at the end and return all of them."""
        if self.k is None:
            self.k, self.v = k, v
        elif self._in_place(k, v):
            self.k, self.v = self._written(k, v)
        else:
            self.k, self.v = self._joined(k, v)
            self._memory = []  # which lacks these rows
        return self.k, self.v

    def followed_by(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All rows and then these, which are not added."""
        return self._written(k, v) if self._memory and self._in_place(k, v) else self._joined(k, v)

    def truncate(self, length: int) -> None:
        """Forget the rows from `length` on."""
        if self.length > length:
            self.k, self.v = self.k[:, :length], self.v[:, :length]

    def _in_place(self, *new: Tensor) -> bool:
        """True if new rows may be written behind the old ones; `torch.cat` refuses or promotes what does not fit."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if self.k.device.type == "cpu" and self.k.numel() < SMALL:
            return False
        if not torch.is_inference_mode_enabled() and any(memory.is_inference() for memory in self._memory):
            return False
        return all(_fits(own, rows) for own, rows in zip((self.k, self.v), new, strict=True))

    def _joined(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.k, k], dim=1), torch.cat([self.v, v], dim=1)

    def _written(self, *new: Tensor) -> tuple[Tensor, Tensor]:
        first, num = self.length, new[0].shape[1]
        if not self._memory or first + num > self._memory[0].shape[1]:
            self._memory = [_room_for(own, 2 * (first + num)) for own in (self.k, self.v)]
        for memory, rows in zip(self._memory, new, strict=True):
            memory.narrow(1, first, num).copy_(rows)
        k, v = self._memory
        return k.narrow(1, 0, first + num), v.narrow(1, 0, first + num)


def _fits(own: Tensor, new: Tensor) -> bool:
    """True if two tensors differ in their number of rows alone."""
    return (own.dtype == new.dtype and own.device == new.device and own.shape[0] == new.shape[0]
            and own.shape[2:] == new.shape[2:])


def _room_for(rows: Tensor, num: int) -> Tensor:
    """Memory of `num` rows that begins with the given ones."""
    memory = rows.new_empty(rows.shape[0], num, *rows.shape[2:])
    memory[:, : rows.shape[1]] = rows
    return memory


class Cache:
    """A tree of layer caches, each created on first use as `make(path)`; the path ends in the layer's number."""

    def __init__(self, make: Callable[[Path], LayerCache] = lambda path: LayerCache(), path: Path = ()):
        self._make, self._path = make, path
        self._children: dict[Hashable, Cache] = {}
        self._layers: dict[int, LayerCache] = {}

    def child(self, *path: Hashable) -> "Cache":
        node = self
        for name in path:
            if name not in node._children:
                node._children[name] = Cache(node._make, (*node._path, name))
            node = node._children[name]
        return node

    def own(self, *path: Hashable) -> "Cache":
        """The part at a path if there is one, else the whole."""
        node = self
        for name in path:
            if name not in node._children:
                return self
            node = node._children[name]
        return node

    def layer(self, index: int) -> LayerCache:
        if index not in self._layers:
            self._layers[index] = self._make((*self._path, index))
        return self._layers[index]

    def truncate(self, length: int) -> None:
        for layer in self._layers.values():
            layer.truncate(length)
        for child in self._children.values():
            child.truncate(length)

    def of_block(self, block: int | None) -> "Cache":
        """The part for one of several blocks of a core; the whole cache if there is one block (None)."""
        return self if block is None else self.child("block", block)

    def num_bytes(self) -> int:
        own = sum(t.nbytes for layer in self._layers.values() for t in (layer.k, layer.v) if t is not None)
        return own + sum(child.num_bytes() for child in self._children.values())
