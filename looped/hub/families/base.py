"""A family of pretrained models: its settings, and the names of its tensors beside ours; and the cut of a stack."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from looped.errors import UserError

Names = dict[str, tuple[str, ...]]
"""Our name of a tensor -> theirs, joined along the first axis."""
Raw = Mapping[str, Any]
"""A config.json."""


@dataclass(frozen=True)
class Cut:
    """Layers of a dense stack, by their numbers there, as prelude, core and coda."""

    prelude: range
    core: range
    coda: range

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
                   range(num_layers - coda, num_layers))

    def left_out(self, num_layers: int) -> set[int]:
        """The layers that have no place."""
        return set(range(num_layers)) - {*self.prelude, *self.core, *self.coda}

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the sizes, and of the loop where the stack is cut."""
        sizes = {f"model.num_{name}_layers": len(getattr(self, name)) for name in ("prelude", "core", "coda")}
        if not (len(self.prelude) or len(self.coda)):
            return sizes
        return sizes | {"model.injection": "linear", "model.state_init": "like-init", "objective": "truncated",
                        "recurrence.mean": 4}

    def places(self) -> list[tuple[str, int]]:
        """(our name of a layer, its number in the stack)."""
        return [*((f"prelude.{place}", number) for place, number in enumerate(self.prelude)),
                *((f"recurrence.core.blocks.0.layers.{place}", number) for place, number in enumerate(self.core)),
                *((f"coda.{place}", number) for place, number in enumerate(self.coda))]


@dataclass(frozen=True)
class Family:
    """A family of models. name: the `model_type` of its config.json. settings: (config.json, the folder's name) -> our
    settings; raises UserError for what this package does not compute. names: (cut, config.json) -> the places of all
    tensors."""

    name: str
    settings: Callable[[Raw, str], dict[str, Any]]
    names: Callable[[Cut, Raw], Names]
