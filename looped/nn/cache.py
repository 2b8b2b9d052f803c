"""KV cache of a looped model: a tree over loop steps and layers, each created on first use.

A path names a place: `cache.child("core", 3).layer(0)` is layer 0 of loop step 3. Nothing is sized in advance, so the
number of loop or solver steps is free at call time.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Path = tuple[Hashable, ...]


class LayerCache:
    """Keys and values (B, M, G, K) of one layer."""

    def __init__(self, k: Tensor | None = None, v: Tensor | None = None):
        self.k: Tensor | None = k
        self.v: Tensor | None = v

    @property
    def length(self) -> int:
        return 0 if self.k is None else self.k.shape[1]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows at the end and return all of them."""
        self.k = k if self.k is None else torch.cat([self.k, k], dim=1)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=1)
        return self.k, self.v

    def truncate(self, length: int) -> None:
        """Forget the rows from `length` on."""
        if self.length > length:
            self.k, self.v = self.k[:, :length], self.v[:, :length]


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
