"""Base of the model families: config.json and tensors mapped to ours, a stack split into prelude, core and coda.

The map of a family works in both directions: a `Link` says which rows of which tensors are equal there and here.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from looped.config import Config
from looped.errors import UserError

Raw = Mapping[str, Any]
"""The content of a config.json."""
Shapes = Mapping[str, Sequence[int]]
"""Name of a tensor -> its shape."""


@dataclass(frozen=True)
class Link:
    """Tensors with the same rows: ours and theirs, each concatenated along the first axis.

    order: for each of our rows the index of the equal row of theirs, None if the order is the same. shape: of each of
    their tensors, if it is not an equal part of the concatenated rows.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    order: Tensor | None = None
    shape: tuple[int, ...] | None = None

    def expected(self, shapes: Shapes) -> tuple[int, ...]:
        """The shape of each of their tensors, given the shapes of ours."""
        rows, rest = sum(shapes[name][0] for name in self.ours), tuple(shapes[self.ours[0]][1:])
        return self.shape or (rows // len(self.theirs), *rest)

    def read(self, theirs: Sequence[Tensor], shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of ours, made from theirs."""
        sizes, rest = [shapes[name][0] for name in self.ours], shapes[self.ours[0]][1:]
        rows = (torch.cat(list(theirs)) if len(theirs) > 1 else theirs[0]).reshape(sum(sizes), *rest)
        rows = rows if self.order is None else rows[self.order]
        yield from zip(self.ours, rows.split(sizes), strict=True)

    def write(self, ours: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of theirs, made from ours: the inverse of `read`."""
        rows = torch.cat(list(ours)) if len(ours) > 1 else ours[0]
        rows = rows if self.order is None else rows[self.order.argsort()]
        for name, tensor in zip(self.theirs, rows.chunk(len(self.theirs)), strict=True):
            yield name, tensor if self.shape is None else tensor.reshape(self.shape)


def same(ours: str, *theirs: str) -> Link:
    """The link of one of our tensors to theirs, concatenated."""
    return Link((ours,), theirs)


@dataclass(frozen=True)
class Layout:
    """A model in the layout of a family: its config.json, and links to all tensors. extras: further tensors of its
    folders, which follow from the config."""

    raw: Mapping[str, Any]
    links: Sequence[Link]
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(their name, tensor) for the weights of a model, given by our names."""
        for link in self.links:
            for name, tensor in link.write([weights[ours] for ours in link.ours]):
                yield name, tensor.clone(memory_format=torch.contiguous_format)  # a layer may occur several times
        yield from self.extras.items()


CORE = "recurrence.core.blocks.0"


@dataclass(frozen=True)
class Cut:
    """The layers of a pretrained model, by index, as prelude, core and coda. made: the loop is cut out of a dense
    stack."""

    prelude: range
    core: range
    coda: range
    made: bool = False

    @classmethod
    def whole(cls, num_layers: int) -> "Cut":
        return cls(range(0), range(num_layers), range(0))

    @classmethod
    def of(cls, text: str, num_layers: int) -> "Cut":
        """The cut of "P/N/C": the first P layers, the last C, and the N right before these. Raises UserError."""
        try:
            prelude, core, coda = (int(part) for part in text.split("/"))
        except ValueError:
            raise UserError(f"--layers {text!r} is not three numbers; write prelude/core/coda, for instance 4/8/4"
                            ) from None
        if min(prelude, coda) < 0 or core < 1 or prelude + core + coda > num_layers:
            raise UserError(f"--layers {text} asks for {prelude + core + coda} layers, at least one of them in the "
                            f"core, and the model has {num_layers}; ask for no more")
        return cls(range(prelude), range(num_layers - coda - core, num_layers - coda),
                   range(num_layers - coda, num_layers), made=prelude + coda > 0)

    def left_out(self, num_layers: int) -> set[int]:
        """Indices of the layers that the cut drops."""
        return set(range(num_layers)) - {*self.prelude, *self.core, *self.coda}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the sizes, and of the loop if the cut makes one."""
        sizes = {f"model.num_{name}_layers": len(getattr(self, name)) for name in ("prelude", "core", "coda")}
        if not self.made:
            return sizes
        return sizes | {"model.injection": "linear", "model.state_init": "like-init", "objective": "truncated",
                        "recurrence.mean": 4}

    def places(self) -> list[tuple[str, int]]:
        """(our name of a layer, its index in the stack)."""
        return [*((f"prelude.{place}", number) for place, number in enumerate(self.prelude)),
                *((f"{CORE}.layers.{place}", number) for place, number in enumerate(self.core)),
                *((f"coda.{place}", number) for place, number in enumerate(self.coda))]


Places = Sequence[tuple[str, int]]


class Family:
    """A family of models. Its methods raise UserError for models that cannot be computed here, naming `folder`."""

    name: str
    """The `model_type` of its config.json."""
    needs: tuple[str, ...] = ("vocab_size", "num_hidden_layers")
    """The whole numbers that a config.json must have."""
    unused: str = r"rotary_emb\.inv_freq$"
    """A regular expression for unused tensors in some of its folders."""

    def is_family_of(self, raw: Raw) -> bool:
        """True for a config.json of this family."""
        return raw.get("model_type") == self.name

    def holds(self, names: Collection[str]) -> bool:
        """True for the tensors of this family, if another one has the same config.json."""
        return True

    def completed(self, raw: Raw, names: Collection[str]) -> Raw:
        """A config.json with values that it leaves to the default of its class, inferred from the tensors' names."""
        return raw

    def vocab_size(self, raw: Raw) -> int:
        """Rows of the embedding."""
        return raw["vocab_size"]

    def cut(self, raw: Raw, layers: str | None, folder: str) -> Cut:
        """The layers as prelude, core and coda; layers: "P/N/C", the cut of a dense stack."""
        raise NotImplementedError

    def settings(self, raw: Raw, folder: str) -> dict[str, Any]:
        """Our settings, except those of the cut."""
        raise NotImplementedError

    def links(self, raw: Raw, cut: Cut) -> list[Link]:
        """The links of all tensors of a model."""
        raise NotImplementedError

    def written(self, config: Config, vocab_size: int, depth: int) -> Layout:
        """A model of `config` at a depth in this layout: the inverse of `links`. Raises UserError if none fits."""
        raise UserError(f"models cannot be written as {self.name}")

    def left_out(self, raw: Raw, cut: Cut) -> str:
        """A regular expression for the tensors that a cut drops."""
        return r"\b\B"


def require(raw: Raw, folder: str, *names: str) -> None:
    """Raises UserError if a config.json lacks a value whose default differs between families."""
    for name in names:
        if raw.get(name) is None:
            raise UserError(f"{folder} does not set {name}, whose default differs between families; add it to its "
                            f"config.json")


def refuse(raw: Raw, folder: str, **wanted: Any) -> None:
    """Raises UserError if a config.json has another value than the only supported one."""
    for name, value in wanted.items():
        if raw.get(name, value) != value:
            raise UserError(f"{folder} has {name} {raw[name]!r}, which no model here supports; only {value!r} can be "
                            f"imported")
