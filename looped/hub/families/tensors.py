"""Safetensors of a folder, one file or several, read tensor by tensor into the weights of a model."""

import json
import re
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from looped.errors import UserError
from looped.hub.families.base import Names

DERIVED = re.compile(r"rotary_emb\.inv_freq$|freqs_cis$")
"""Tensors that some folders hold though they follow from the config."""


def _shards(index: Path) -> list[str]:
    """The files that an index names. Raises UserError."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is no index of shards ({type(error).__name__}); fetch it again") from None


class Tensors:
    """The tensors of a folder by their names. Raises UserError where they are not to be read: pickles are never."""

    def __init__(self, folder: Path):
        self.folder, self.stack, self.files = folder, ExitStack(), {}
        index = folder / "model.safetensors.index.json"
        for name in _shards(index) if index.is_file() else ["model.safetensors"]:
            try:
                file = self.stack.enter_context(safe_open(folder / name, framework="pt"))
            except FileNotFoundError:
                pickled = any(folder.glob("*.bin"))
                raise UserError(f"{folder} has no {name}" + (
                    "; its weights are pickles, which are not read: save it as safetensors" if pickled else
                    "; fetch the folder again")) from None
            except (OSError, SafetensorError) as error:
                raise UserError(f"{folder / name} is cut short or damaged ({error}); fetch it again") from None
            self.files |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    @torch.no_grad()
    def fill(self, model: nn.Module, names: Names, *, made: Collection[str] = (),
             left_out: Collection[int] = ()) -> None:
        """Every weight of a model, but those that are `made`, from its place; every tensor is used, but those of the
        layers that are left out. Raises UserError."""
        weights = {name: weight for name, weight in model.state_dict().items() if name not in made}
        if weights.keys() != names.keys():
            odd = sorted(weights.keys() ^ names.keys())[0]
            raise UserError(f"{self.folder} does not fit its own config.json: the model has "
                            f"{'a' if odd in weights else 'no'} weight {odd}")
        for name, weight in weights.items():
            found = torch.cat([self._tensor(each) for each in names[name]])
            if found.shape != weight.shape:
                raise UserError(f"{self.folder} has {' and '.join(names[name])} of shape {tuple(found.shape)}, and by "
                                f"its config.json it is {tuple(weight.shape)}")
            weight.copy_(found)
        used = {each for theirs in names.values() for each in theirs}
        left = sorted(name for name in self.files.keys() - used if not DERIVED.search(name)
                      and not self._is_left_out(name, left_out))
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise UserError(f"{self.folder} holds {left[0]}{more}, which has no place in its family; it is another "
                            f"model than its config.json says")

    def _is_left_out(self, name: str, layers: Collection[int]) -> bool:
        """True for a tensor of one of some layers, or for the second name of a tied head."""
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer is not None:
            return int(layer[1]) in layers
        return name == "lm_head.weight" and torch.equal(self._tensor(name), self._tensor("model.embed_tokens.weight"))

    def _tensor(self, name: str) -> Tensor:
        if name not in self.files:
            raise UserError(f"{self.folder} has no tensor {name}, which its family has; fetch it again")
        return self.files[name].get_tensor(name)
