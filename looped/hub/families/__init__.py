"""Pretrained models as models of this package: a folder of config.json and safetensors, read without running its code.

    model, config = read_pretrained("Llama-3.2-1B", layers="4/8/4")

Every tensor of the folder must map to a weight of the model, and every weight to a tensor.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from looped.config import Config, load_config
from looped.errors import UserError, did_you_mean
from looped.hub.families.base import CORE, Family, Link, Raw
from looped.hub.families.dense import DENSE, PASSES
from looped.hub.families.huginn import Huginn
from looped.hub.families.retrofit import RETROFIT
from looped.hub.families.tensors import Shapes, Tensors
from looped.models.build import build, effective_depth, unseeded
from looped.models.language import LanguageModel, start_weights
from looped.nn.injection import LinearInjection, build_injection
from looped.rng import seeded_init

FAMILIES: tuple[Family, ...] = (*DENSE, *PASSES, Huginn(), *RETROFIT)


@dataclass(frozen=True)
class Pretrained:
    """A model in a folder: its config here, and its weights, which are read on demand. links: map between its tensors
    and ours; skipped: a regular expression for the tensors without a place here."""

    folder: Path
    raw: Raw
    family: Family
    config: Config
    links: list[Link]
    skipped: str

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; a tokenizer may have fewer."""
        return self.family.vocab_size(self.raw)

    @cached_property
    def skeleton(self) -> LanguageModel:
        """The model on the meta device, without memory for its weights."""
        with torch.device("meta"):
            return unseeded(self.config, self.vocab_size)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weight in float32) of the model, one at a time in memory.

        All tensors are checked before this returns. Raises UserError for tensors that are missing, left over or of
        another shape."""
        linked, shapes = {name for link in self.links for name in link.ours}, {}
        made = _injection(self.config) if not any(".injection." in name for name in linked) else {}
        for name, weight in self.skeleton.state_dict().items():
            if name not in made:
                shapes[name] = weight.shape
        with Tensors(self.folder) as tensors:
            tensors.check(self.links, shapes, skipped=self.skipped)
        return itertools.chain(self._read(shapes), made.items())

    def _read(self, shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
        with Tensors(self.folder) as tensors:
            for name, tensor in tensors.read(self.links, shapes):
                yield name, tensor.float()


def open_pretrained(folder: str | Path, layers: str | None = None,
                    settings: Mapping[str, Any] | None = None) -> Pretrained:
    """The model of a folder. layers: as in `read_pretrained`; settings: of the config, on top of the model's. Raises
    UserError if it is no such folder, and for an unknown family."""
    folder = Path(folder)
    raw = _read_config(folder)
    family = _family_of(raw, folder)
    for name in family.needs:
        if raw.get(name) is None:
            raise UserError(f"{folder / 'config.json'} is not a model's config: it has no {name}")
        if not isinstance(raw[name], int) or raw[name] < 0:
            raise UserError(f"{folder / 'config.json'} is not a model's config: its {name} is {raw[name]!r}, not a "
                            f"whole number of 0 or more")
    with Tensors(folder) as tensors:
        raw = family.completed(raw, tensors.files)
    cut = family.cut(raw, layers, str(folder))
    config = load_config(None, {**family.settings(raw, str(folder)), **cut.settings, **(settings or {})}, auto=False)
    return Pretrained(folder, raw, family, config, family.links(raw, cut),
                      f"{family.unused}|{family.left_out(raw, cut)}")


def read_pretrained(folder: str | Path, layers: str | None = None) -> tuple[LanguageModel, Config]:
    """The model of a folder, in float32, and its config.

    layers: "P/N/C" cuts a dense stack: its first P layers are the prelude, its last C the coda, the N right before the
    coda the core; the others are left out (Retrofit, arXiv 2511.07384). An injection [0 | I] is added: with it the
    untrained cut model computes just these layers in sequence, at any depth. None: all layers are one block, which runs
    once, or as often as the family loops. Raises UserError if it is no such folder, for an unknown family, and for
    tensors that are missing, left over or of another shape.
    """
    found = open_pretrained(folder, layers)
    model = build(found.config, found.vocab_size)
    ours = model.state_dict()
    for name, weight in found.weights():
        ours[name].copy_(weight)
    return model.eval(), found.config


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is not a mapping")
    except OSError as error:
        raise UserError(f"{folder} is not a model's folder: {path.name} cannot be read ({error.strerror or error}); "
                        f"give one that save_pretrained wrote") from None
    except ValueError as error:
        raise UserError(f"{path} is not a model's config: {error}") from None
    return found


def _family_of(raw: Raw, folder: Path) -> Family:
    """The family of a config.json, or by names of tensors if that is ambiguous. Raises UserError."""
    found = [family for family in FAMILIES if family.is_family_of(raw)]
    if len(found) > 1:
        with Tensors(folder) as tensors:
            found = [family for family in found if family.holds(tensors.files)]
    if not found:
        known = {family.name for family in FAMILIES}
        raise UserError(f"{folder} is a model of the family '{raw.get('model_type')}', which is not known here"
                        f"{did_you_mean(str(raw.get('model_type')), known)}")
    return found[0]


def _injection(config: Config) -> dict[str, Tensor]:
    """The weights of the injection added to a cut stack, by name. Linear: [0 | I], which ignores the state and passes
    the encoded input on. Others are initialised as in training from scratch."""
    width = config.model.width
    with seeded_init(config.seed, "init"):
        module = build_injection(config.model.injection, width)
        start_weights(module, width, effective_depth(config))
    if isinstance(module, LinearInjection):
        module.start_at_input()
    return {f"{CORE}.injection.{name}": weight for name, weight in module.state_dict().items()}
