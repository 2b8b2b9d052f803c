"""Huginn (Geiping et al. 2025, arXiv 2502.05171), whose layout of prelude, core and coda others of its code share.

Names, order and rotation are those of raven_modeling_minimal.py in github.com/seal-rg/recurrent-pretraining. Rotary
positions turn pairs of neighbours there and the two halves of a head here, so rows 2j and 2j + 1 of a head's queries
and keys, and their biases, are our rows j and j + K / 2.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from looped.config import Config
from looped.config.model import ModelConfig
from looped.errors import UserError
from looped.hub.families.base import CORE, Cut, Family, Layout, Link, Raw, refuse, require, same
from looped.hub.families.dense import rope_of
from looped.hub.families.written import SIZES, check_like

BLOCK = 4096
"""Positions that Huginn's code has angles for."""
PARTS = {"prelude": "prelude", "recurrence": "core_block", "coda": "coda"}
"""The first word of our name of a layer -> theirs."""


def embed_scale(raw: Raw) -> float | None:
    """The factor of embedded tokens; None where a config.json does not say it."""
    return (raw.get("init_values") or {}).get("embed_scale")


def is_retrofit(raw: Raw) -> bool:
    """Retrofit keeps Huginn's `model_type` and keys, and is told by two marks of its conversion: embedded tokens are
    not scaled, and the base of the positions is the donor's `rope_theta`, which Huginn has not. Tensors do not tell:
    norms of Huginn's may be left over."""
    return embed_scale(raw) == 1 and rope_of(raw).get("rope_theta") is not None


class Raven(Family):
    """A model in Huginn's layout. Subclasses say what it is made of."""

    name = "huginn_raven"
    needs: tuple[str, ...] = (
        "n_embd", "n_heads", "n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda",
        "intermediate_size", "padded_vocab_size", "mean_recurrence", "mean_backprop_depth")
    unused = r"^freqs_cis$"
    norms: Mapping[str, str]
    """Ours and theirs."""

    def vocab_size(self, raw: Raw) -> int:
        return raw["padded_vocab_size"]

    def cut(self, raw: Raw, layers: str | None, folder: str) -> Cut:
        if layers is not None:
            raise UserError(f"{folder} has a prelude, a core and a coda already, so --layers {layers} has no dense "
                            f"stack to cut; leave it out")
        return Cut(*(range(raw[f"n_layers_in_{part}"]) for part in ("prelude", "recurrent_block", "coda")))

    def settings(self, raw: Raw, folder: str) -> dict[str, Any]:
        """Those of the sizes, and of training: one depth per batch, drawn about the mean or fixed."""
        require(raw, folder, "norm_eps", "tie_embeddings", "injection_type", "state_init")
        refuse(raw, folder, bias=False, block_class_name="SandwichBlock", norm_class_name="RMSNorm_llama",
               mlp_class_name="GatedMLP", nonlin_name="SiLU", state_init="like-init", test_time_noise=0,
               head_dim=raw["n_embd"] // max(raw["n_heads"], 1))
        fixed = "fixed" in str(raw.get("sampling_scheme"))
        found = {"width": raw["n_embd"], "num_heads": raw["n_heads"], "num_kv_heads": raw.get("num_key_value_heads"),
                 "ffn_width": raw["intermediate_size"], "norm_eps": raw["norm_eps"],
                 "tie_embeddings": raw["tie_embeddings"]}
        return {f"model.{name}": value for name, value in found.items()} | {
            "objective": "truncated", "recurrence.mean": raw["mean_recurrence"],
            "recurrence.backprop": raw["mean_backprop_depth"], "recurrence.per_sequence": False,
            "recurrence.distribution": "fixed" if fixed else "huginn"}

    def links(self, raw: Raw, cut: Cut) -> list[Link]:
        found = [same("embed.weight", "transformer.wte.weight"), same("norm.weight", "transformer.ln_f.weight")]
        if raw["injection_type"] == "linear":
            found.append(same(f"{CORE}.injection.mix.weight", "transformer.adapter.weight"))
        if not raw["tie_embeddings"]:
            found.append(same("head.weight", "lm_head.weight"))
        for ours, number in cut.places():
            found += self.layer(raw, ours, f"transformer.{PARTS[ours.split('.')[0]]}.{number}")
        return found

    def layer(self, raw: Raw, ours: str, theirs: str) -> list[Link]:
        """All tensors of a layer."""
        return [*(same(f"{ours}.{norm}.weight", f"{theirs}.{name}.weight") for norm, name in self.norms.items()),
                Link(tuple(f"{ours}.attn.{part}.weight" for part in "qkv"), (f"{theirs}.attn.Wqkv.weight",),
                     self.rows(raw)),
                same(f"{ours}.attn.out.weight", f"{theirs}.attn.proj.weight"),
                same(f"{ours}.mlp.in_.weight", f"{theirs}.mlp.fc.weight"),
                same(f"{ours}.mlp.out.weight", f"{theirs}.mlp.proj.weight")]

    def rows(self, raw: Raw) -> Tensor | None:
        """Our rows of queries, keys and values as numbers of theirs; None where they are alike."""
        return None


class Huginn(Raven):
    """Huginn: sandwich norms, biases of queries and keys, one norm after the loop and again after the coda."""

    norms: dict[str, str] = {f"n{number}": f"norm_{number}" for number in (1, 2, 3, 4)}

    def is_family_of(self, raw: Raw) -> bool:
        return super().is_family_of(raw) and not is_retrofit(raw)

    def settings(self, raw: Raw, folder: str) -> dict[str, Any]:
        _refuse_neither(raw, folder)
        require(raw, folder, "rope_base", "qk_bias")
        if raw["injection_type"] not in ("linear", "add"):
            raise UserError(f"{folder} has injection_type {raw['injection_type']!r}, which no model here computes; "
                            f"only linear and add can be read")
        if raw["qk_bias"] and raw.get("num_key_value_heads", raw["n_heads"]) != raw["n_heads"]:
            raise UserError(f"{folder} has qk_bias and num_key_value_heads {raw['num_key_value_heads']} beside n_heads "
                            f"{raw['n_heads']}, and Huginn's biases are for as many; it is another model than its "
                            f"config.json says")
        std = (raw.get("init_values") or {}).get("std")
        usual = std is None or math.isclose(5 * raw["n_embd"] * std**2, 2)
        return super().settings(raw, folder) | {
            "model.preset": "huginn", "model.rope_base": raw["rope_base"], "model.injection": raw["injection_type"],
            "model.attention_bias": "qk" if raw["qk_bias"] else "none",
            "model.state_std": None if usual else std * math.sqrt(raw["n_embd"])}

    def written(self, config: Config, vocab_size: int, depth: int) -> Layout:
        """As it is, with the depth as `mean_recurrence`."""
        free = {*SIZES, "attention_bias"} - {"head_dim", "rope_scaling"}
        check_like(config, "huginn", free, injection=("linear", "add"), attention_bias=("qk", "none"),
                   num_kv_heads=(None, config.model.num_heads), head_dim=(None, config.model.head_width))
        if config.blocks.num > 1:
            raise UserError(f"blocks.num is {config.blocks.num}, and Huginn's core is one block; export it --to hf")
        raw = _config_of(config, vocab_size, depth)
        cut = self.cut(raw, None, "")
        return Layout(raw, self.links(raw, cut), {"freqs_cis": _angles(config.model)})

    def layer(self, raw: Raw, ours: str, theirs: str) -> list[Link]:
        found = super().layer(raw, ours, theirs)
        if not raw["qk_bias"]:
            return found
        num, dim = raw["n_heads"], raw["n_embd"] // raw["n_heads"]
        return [*found, Link(tuple(f"{ours}.attn.{part}.bias" for part in "qk"), (f"{theirs}.attn.qk_bias",),
                             halves(2 * num, dim), (2, 1, num, dim))]

    def rows(self, raw: Raw) -> Tensor:
        num, dim = raw["n_heads"], raw["n_embd"] // raw["n_heads"]
        keys = raw.get("num_key_value_heads") or num
        turned = halves(num + keys, dim)
        return torch.cat([turned, torch.arange(len(turned), len(turned) + keys * dim)])


def _config_of(config: Config, vocab_size: int, depth: int) -> dict[str, Any]:
    """Huginn's config.json for a model."""
    m, r = config.model, config.recurrence
    return {
        "model_type": "huginn_raven", "architectures": ["RavenForCausalLM"], "n_embd": m.width, "n_heads": m.num_heads,
        "num_key_value_heads": m.kv_heads, "head_dim": m.head_width, "intermediate_size": m.hidden, "bias": False,
        "n_layers": m.num_prelude_layers + m.num_core_layers + m.num_coda_layers,
        "n_layers_in_prelude": m.num_prelude_layers, "n_layers_in_recurrent_block": m.num_core_layers,
        "n_layers_in_coda": m.num_coda_layers, "vocab_size": vocab_size, "padded_vocab_size": vocab_size,
        "block_size": BLOCK, "tie_embeddings": m.tie_embeddings, "tie_word_embeddings": m.tie_embeddings,
        "qk_bias": m.attention_bias == "qk", "norm_eps": m.norm_eps, "rope_base": m.rope_base,
        "mean_recurrence": depth, "mean_backprop_depth": r.backprop, "injection_type": m.injection,
        "state_init": "like-init", "block_class_name": "SandwichBlock", "norm_class_name": "RMSNorm_llama",
        "mlp_class_name": "GatedMLP", "nonlin_name": "SiLU", "test_time_noise": 0,
        "sampling_scheme": "fixed" if r.distribution == "fixed" else "poisson-lognormal-filling",
        "init_values": {"std": math.sqrt(2 / (5 * m.width)) if m.state_std is None else m.state_std / m.width**0.5,
                        "embed_scale": math.sqrt(m.width)}}


def _angles(model: ModelConfig) -> Tensor:
    """The buffer freqs_cis (1, positions, 1, K / 2, 2) of cosines and sines, which Huginn's class saves."""
    pairs = torch.arange(0, model.head_width, 2, dtype=torch.float64) / model.head_width
    angles = torch.outer(torch.arange(BLOCK, dtype=torch.float64), model.rope_base**-pairs)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()[None, :, None]


def halves(num_heads: int, head_dim: int) -> Tensor:
    """The rows of heads by halves, 0 2 4 ... 1 3 5 ..., as numbers of rows whose pairs are neighbours, 0 1, 2 3, ..."""
    return torch.arange(num_heads * head_dim).view(num_heads, -1, 2).transpose(1, 2).flatten()


def _refuse_neither(raw: Raw, folder: str) -> None:
    """Raises UserError for a config.json with marks of Huginn and of Retrofit."""
    scale, theta, usual = embed_scale(raw), rope_of(raw).get("rope_theta"), math.sqrt(raw["n_embd"])
    if theta is not None or not (scale is None or math.isclose(scale, usual)):
        raise UserError(f"{folder} is Huginn by its config.json, with embed_scale {usual:g} and no rope_theta, or "
                        f"Retrofit, with embed_scale 1 and a rope_theta, and it has embed_scale {scale} and rope_theta "
                        f"{theta}; correct these two, embed_scale in init_values")
