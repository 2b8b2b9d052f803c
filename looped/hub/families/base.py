"""A family of pretrained models: its config.json as our settings, and its tensors beside ours; and the cut of a stack.

The table of a family goes both ways: a `Link` says which rows of which tensors are the same there and here.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from looped.config import Config
from looped.errors import UserError

Raw = Mapping[str, Any]
"""A config.json."""
Shapes = Mapping[str, Sequence[int]]
"""Of tensors, by name."""


@dataclass(frozen=True)
class Link:
    """Tensors that hold the same rows: ours, joined along the first axis, and theirs, joined.

    order: the rows of ours as numbers of theirs, None where they are alike. shape: of theirs, where it is not that of
    equal parts of the joined rows.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    order: Tensor | None = None
    shape: tuple[int, ...] | None = None

    def expected(self, shapes: Shapes) -> tuple[int, ...]:
        """The shape of each of theirs, by those of ours."""
        rows, rest = sum(shapes[name][0] for name in self.ours), tuple(shapes[self.ours[0]][1:])
        return self.shape or (rows // len(self.theirs), *rest)

    def read(self, theirs: Sequence[Tensor], shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of ours."""
        sizes, rest = [shapes[name][0] for name in self.ours], shapes[self.ours[0]][1:]
        rows = (torch.cat(list(theirs)) if len(theirs) > 1 else theirs[0]).reshape(sum(sizes), *rest)
        rows = rows if self.order is None else rows[self.order]
        yield from zip(self.ours, rows.split(sizes), strict=True)

    def write(self, ours: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of theirs: `read` undone."""
        rows = torch.cat(list(ours)) if len(ours) > 1 else ours[0]
        rows = rows if self.order is None else rows[self.order.argsort()]
        for name, tensor in zip(self.theirs, rows.chunk(len(self.theirs)), strict=True):
            yield name, tensor if self.shape is None else tensor.reshape(self.shape)


def same(ours: str, *theirs: str) -> Link:
    """The link of one tensor of ours, theirs joined."""
    return Link((ours,), theirs)


@dataclass(frozen=True)
class Layout:
    """A model in the layout of a family: its config.json, and links to all tensors. extras: those that follow from the
    config and are in its folders nevertheless."""

    raw: Mapping[str, Any]
    links: Sequence[Link]
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(their name, tensor), of the weights of a model by our names."""
        for link in self.links:
            for name, tensor in link.write([weights[ours] for ours in link.ours]):
                yield name, tensor.clone(memory_format=torch.contiguous_format)  # layers may be there several times
        yield from self.extras.items()


CORE = "recurrence.core.blocks.0"


@dataclass(frozen=True)
class Cut:
    """Layers of a model, by their numbers there, as prelude, core and coda. made: they are a stack's, and the loop is
    made of it."""

    prelude: range
    core: range
    coda: range
    made: bool = False

    @classmethod
    def whole(cls, num_layers: int) -> "Cut":
        return cls(range(0), range(num_layers), range(0))

    @classmethod
    def of(cls, text: str, num_layers: int) -> "Cut":
        """The first P, the last C, and N right before these, of "P/N/C". Raises UserError."""
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
        """The layers that have no place."""
        return set(range(num_layers)) - {*self.prelude, *self.core, *self.coda}

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the sizes, and of the loop where one is made."""
        sizes = {f"model.num_{name}_layers": len(getattr(self, name)) for name in ("prelude", "core", "coda")}
        if not self.made:
            return sizes
        return sizes | {"model.injection": "linear", "model.state_init": "like-init", "objective": "truncated",
                        "recurrence.mean": 4}

    def places(self) -> list[tuple[str, int]]:
        """(our name of a layer, its number in the stack)."""
        return [*((f"prelude.{place}", number) for place, number in enumerate(self.prelude)),
                *((f"{CORE}.layers.{place}", number) for place, number in enumerate(self.core)),
                *((f"coda.{place}", number) for place, number in enumerate(self.coda))]


Places = Sequence[tuple[str, int]]


class Family:
    """A family of models. Its methods raise UserError for what no model here computes; `folder` names it there."""

    name: str
    """The `model_type` of its config.json."""
    needs: tuple[str, ...] = ("vocab_size", "num_hidden_layers")
    """The whole numbers that a config.json has to say at least."""
    unused: str = r"rotary_emb\.inv_freq$"
    """A pattern of tensors that some of its folders hold though nothing reads them."""

    def is_family_of(self, raw: Raw) -> bool:
        """True for a config.json of this family."""
        return raw.get("model_type") == self.name

    def holds(self, names: Collection[str]) -> bool:
        """True for tensors of this family, where another has the same config.json."""
        return True

    def completed(self, raw: Raw, names: Collection[str]) -> Raw:
        """A config.json with what it leaves to a default of its class, as the names of the tensors tell it."""
        return raw

    def vocab_size(self, raw: Raw) -> int:
        """Rows of the embedding."""
        return raw["vocab_size"]

    def cut(self, raw: Raw, layers: str | None, folder: str) -> Cut:
        """The layers as prelude, core and coda; `layers`: those that a dense stack is cut into."""
        raise NotImplementedError

    def settings(self, raw: Raw, folder: str) -> dict[str, Any]:
        """Our settings but those of the cut."""
        raise NotImplementedError

    def links(self, raw: Raw, cut: Cut) -> list[Link]:
        """All tensors of a model."""
        raise NotImplementedError

    def written(self, config: Config, vocab_size: int, depth: int) -> Layout:
        """A model of `config` at a depth in this layout: `links` undone. Raises UserError where it has no place."""
        raise UserError(f"no model is written as {self.name}")

    def left_out(self, raw: Raw, cut: Cut) -> str:
        """A pattern of the tensors that a cut leaves out."""
        return r"\b\B"


def require(raw: Raw, folder: str, *names: str) -> None:
    """Raises UserError where a config.json does not say what differs from family to family."""
    for name in names:
        if raw.get(name) is None:
            raise UserError(f"{folder} does not say its {name}, whose default differs from family to family; add it to "
                            f"its config.json")


def refuse(raw: Raw, folder: str, **wanted: Any) -> None:
    """Raises UserError where a config.json has another value than the only one that can be read."""
    for name, value in wanted.items():
        if raw.get(name, value) != value:
            raise UserError(f"{folder} has {name} {raw[name]!r}, which no model here computes; only {value!r} can be "
                            f"read")
