"""Reads the safetensors of a model folder one tensor at a time, and checks them against the names of a family."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from looped.errors import UserError
from looped.hub.families.base import Link, Shapes

FLOATS = ("F64", "F32", "F16", "BF16")


def _shards(index: Path) -> list[str]:
    """The files that an index names. Raises UserError."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is not an index of shards ({type(error).__name__}); fetch it again") from None


class Tensors:
    """The tensors of a folder by name. Raises UserError if they cannot be read; pickles never are."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.stack: ExitStack[bool | None] = ExitStack()
        self.files: dict[str, Any] = {}
        self.paths: dict[str, Path] = {}
        index = folder / "model.safetensors.index.json"
        for name in _shards(index) if index.is_file() else ["model.safetensors"]:
            try:
                file = self.stack.enter_context(safe_open(folder / name, framework="pt"))
            except FileNotFoundError:
                pickled = any(folder.glob("*.bin"))
                raise UserError(f"{folder} has no {name}" + (
                    "; its weights are pickles, which are not read: save them as safetensors" if pickled else
                    "; fetch the folder again")) from None
            except (OSError, SafetensorError) as error:
                raise UserError(f"{folder / name} is cut short or damaged ({error}); fetch it again") from None
            self.files |= dict.fromkeys(file.keys(), file)
            self.paths |= dict.fromkeys(file.keys(), folder / name)

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def check(self, links: Sequence[Link], shapes: Shapes, *, skipped: str) -> None:
        """Check that the links cover all of our tensors (`shapes`), that the folder's have the shapes to match, and
        that all of those are used, except names that match `skipped`. Only a tied head is read.

        Raises UserError that names the first tensor that is missing, left over, of another shape, or not of floats.
        """
        linked = [name for link in links for name in link.ours]
        if sorted(linked) != sorted(shapes):
            odd = sorted({*linked} ^ {*shapes})[0]
            raise UserError(f"a model with these settings has {'a' if odd in shapes else 'no'} weight {odd}, but "
                            f"{self.folder} has {'none' if odd in shapes else 'one'}; keep the model settings of its "
                            f"config.json, and change them in training with training.warm_start")
        for link in links:
            expected = link.expected(shapes)
            for name in link.theirs:
                self._check_one(name, expected)
        used = {name for link in links for name in link.theirs}
        left = sorted(name for name in self.files.keys() - used
                      if not re.search(skipped, name) and not self._is_tied_head(name, links))
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise UserError(f"{self.folder} holds {left[0]}{more}, which has no place in its family; the model differs "
                            f"from its config.json")

    def _check_one(self, name: str, expected: tuple[int, ...]) -> None:
        if name not in self.files:
            raise UserError(f"{self.folder} has no tensor {name}, which its family has; fetch it again")
        there = self.files[name].get_slice(name)
        if tuple(there.get_shape()) != expected:
            raise UserError(f"{self.folder} has {name} of shape {tuple(there.get_shape())}, but by its config.json it "
                            f"is {expected}, with the settings given; leave out those of the model, or fetch it again")
        if there.get_dtype() not in FLOATS:
            raise UserError(f"{self.folder} has {name} as {there.get_dtype()}, a quantised model; give one with "
                            f"weights of 16 bits or more")

    def _is_tied_head(self, name: str, links: Sequence[Link]) -> bool:
        """True for a head that repeats the tied embedding under a second name."""
        embedding = next(link.theirs[0] for link in links if link.ours == ("embed.weight",))
        return name == "lm_head.weight" and torch.equal(self._tensor(name), self._tensor(embedding))

    def read(self, links: Sequence[Link], shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
        """(our name, tensor as it is stored), link by link."""
        for link in links:
            yield from link.read([self._tensor(name) for name in link.theirs], shapes)

    def _tensor(self, name: str) -> Tensor:
        with safe_open(self.paths[name], framework="pt") as file:  # closed again, to release the memory
            return file.get_tensor(name)
