"""Pretrained models as models of this package: a folder of config.json and safetensors, read without running its code.

    model, config = read_pretrained("Llama-3.2-1B", layers="4/8/4")

A family is a row of `FAMILIES`: its config.json as settings of `model`, and the names of its tensors beside ours. Every
tensor of the folder has to have a place, and every weight of the model a tensor.
"""

import json
from pathlib import Path
from typing import Any

import torch

from looped.config import Config, load_config
from looped.errors import UserError, did_you_mean
from looped.hub.families.base import Cut, Family
from looped.hub.families.dense import DENSE
from looped.hub.families.tensors import Tensors
from looped.models.build import build
from looped.models.language import LanguageModel
from looped.nn.injection import Linear

FAMILIES: dict[str, Family] = {family.name: family for family in DENSE}
"""By the `model_type` of config.json."""


def read_pretrained(folder: str | Path, layers: str | None = None) -> tuple[LanguageModel, Config]:
    """The model of a folder, in float32, and a config that it is trained and run by.

    layers: "P/N/C" cuts a dense stack into P layers of prelude, its first, N of core, those right before the coda, and
    C of coda, its last; others are left out (Retrofit, arXiv 2511.07384). The injection [0 | I] is added, by which the
    cut model computes what these layers do, at any depth, until it is trained. None: all layers are one block that is
    gone through once, or as often as the family loops. Raises UserError for what is no such folder, for a family that
    is not known, and for tensors that are missing, left over or of another shape.
    """
    raw = _read_config(Path(folder))
    family = FAMILIES.get(raw.get("model_type", ""))
    if family is None:
        raise UserError(f"{folder} is a model of the family '{raw.get('model_type')}', which is not known here"
                        f"{did_you_mean(str(raw.get('model_type')), FAMILIES)}")
    if layers is not None and raw.get("num_loops"):
        raise UserError(f"{folder} loops all of its layers already, so --layers {layers} has no dense stack to cut; "
                        f"leave it out")
    cut = Cut.whole(raw["num_hidden_layers"]) if layers is None else Cut.of(layers, raw["num_hidden_layers"])
    config = load_config(None, {**family.settings(raw, str(folder)), **cut.settings})
    model = build(config, raw["vocab_size"])
    with Tensors(Path(folder)) as tensors:
        tensors.fill(model, family.names(cut, raw), made=_injections(model),
                     left_out=cut.left_out(raw["num_hidden_layers"]))
    return model.eval(), config


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"vocab_size", "num_hidden_layers"} <= found.keys():
            raise ValueError("it does not say vocab_size and num_hidden_layers")
    except OSError as error:
        raise UserError(f"{folder} is no folder of a model: {path.name} cannot be read ({error.strerror or error}); "
                        f"give one that save_pretrained wrote") from None
    except ValueError as error:
        raise UserError(f"{path} is not a model's config: {error}") from None
    return found


@torch.no_grad()
def _injections(model: LanguageModel) -> set[str]:
    """The names of injections, set to [0 | I]: the state is left out, the encoded input goes on as it is."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            width = module.mix.weight.shape[0]
            module.mix.weight.copy_(torch.cat([torch.zeros(width, width), torch.eye(width)], dim=1))
            found.add(f"{name}.mix.weight")
    return found
