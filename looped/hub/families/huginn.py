"""Huginn (Geiping et al. 2025, arXiv 2502.05171), and its layout, which other models built on its code share.

Names, order and rotation are those of raven_modeling_minimal.py in github.com/seal-rg/recurrent-pretraining. Rotary
positions rotate pairs of neighbours there and the two halves of a head here, so rows 2j and 2j + 1 of a head's queries
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
from looped.hub.families.export_config import SIZES, check_like

BLOCK = 4096
"""Number of positions with precomputed angles in Huginn's code."""
PARTS = {"prelude": "prelude", "recurrence": "core_block", "coda": "coda"}
"""First part of our name of a layer -> theirs."""


def embed_scale(raw: Raw) -> float | None:
    """The factor that scales embedded tokens; None if a config.json does not give it."""
    return (raw.get("init_values") or {}).get("embed_scale")


def is_retrofit(raw: Raw) -> bool:
    """True for a config.json of Retrofit. It keeps Huginn's `model_type` and keys, but embedded tokens are not scaled,
    and the rotary base is the donor's `rope_theta`, which Huginn does not have. Tensors are no test: unused norms of
    Huginn may be left in the folder."""
    return embed_scale(raw) == 1 and rope_of(raw).get("rope_theta") is not None


class Raven(Family):
    """A model in Huginn's layout; subclasses define its layers."""

    name = "huginn_raven"
    needs: tuple[str, ...] = (
        "n_embd", "n_heads", "n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda",
        "intermediate_size", "padded_vocab_size", "mean_recurrence", "mean_backprop_depth")
    unused = r"^freqs_cis$"
    norms: Mapping[str, str]
    """Our names -> theirs."""

    def vocab_size(self, raw: Raw) -> int:
        return raw["padded_vocab_size"]

    def cut(self, raw: Raw, layers: str | None, folder: str) -> Cut:
        if layers is not None:
            raise UserError(f"{folder} already has a prelude, a core and a coda, so --layers {layers} has no dense "
                            f"stack to cut; leave it out")
        return Cut(*(range(raw[f"n_layers_in_{part}"]) for part in ("prelude", "recurrent_block", "coda")))

    def settings(self, raw: Raw, folder: str) -> dict[str, Any]:
        """The settings of the sizes and of training: one depth per batch, drawn around the mean or fixed."""
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
        """The links of all tensors of a layer."""
        return [*(same(f"{ours}.{norm}.weight", f"{theirs}.{name}.weight") for norm, name in self.norms.items()),
                Link(tuple(f"{ours}.attn.{part}.weight" for part in "qkv"), (f"{theirs}.attn.Wqkv.weight",),
                     self.rows(raw)),
                same(f"{ours}.attn.out.weight", f"{theirs}.attn.proj.weight"),
                same(f"{ours}.mlp.in_.weight", f"{theirs}.mlp.fc.weight"),
                same(f"{ours}.mlp.out.weight", f"{theirs}.mlp.proj.weight")]

    def rows(self, raw: Raw) -> Tensor | None:
        """For each of our rows of queries, keys and values the index of theirs; None if the order is the same."""
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
            raise UserError(f"{folder} has injection_type {raw['injection_type']!r}, which no model here supports; "
                            f"only linear and add can be imported")
        if raw["qk_bias"] and raw.get("num_key_value_heads", raw["n_heads"]) != raw["n_heads"]:
            raise UserError(f"{folder} has qk_bias, num_key_value_heads {raw['num_key_value_heads']} and n_heads "
                            f"{raw['n_heads']}, but Huginn's biases need equal numbers; the model differs from its "
                            f"config.json")
        std = (raw.get("init_values") or {}).get("std")
        usual = std is None or math.isclose(5 * raw["n_embd"] * std**2, 2)
        return super().settings(raw, folder) | {
            "model.preset": "huginn", "model.rope_base": raw["rope_base"], "model.injection": raw["injection_type"],
            "model.attention_bias": "qk" if raw["qk_bias"] else "none",
            "model.state_std": None if usual else std * math.sqrt(raw["n_embd"])}

    def written(self, config: Config, vocab_size: int, depth: int) -> Layout:
        """The model as it is, with the depth as `mean_recurrence`."""
        free = {*SIZES, "attention_bias"} - {"head_dim", "rope_scaling"}
        check_like(config, "huginn", free, injection=("linear", "add"), attention_bias=("qk", "none"),
                   num_kv_heads=(None, config.model.num_heads), head_dim=(None, config.model.head_width))
        if config.blocks.num > 1:
            raise UserError(f"blocks.num is {config.blocks.num}, but Huginn's core is one block; export it --to hf")
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
    """Row indices that reorder each head from neighbouring pairs (0 1, 2 3, ...) to halves (0 2 4 ... 1 3 5 ...)."""
    return torch.arange(num_heads * head_dim).view(num_heads, -1, 2).transpose(1, 2).flatten()


def _refuse_neither(raw: Raw, folder: str) -> None:
    """Raises UserError for a config.json that mixes features of Huginn and Retrofit."""
    scale, theta, usual = embed_scale(raw), rope_of(raw).get("rope_theta"), math.sqrt(raw["n_embd"])
    if theta is not None or not (scale is None or math.isclose(scale, usual)):
        raise UserError(f"{folder} must be Huginn, with embed_scale {usual:g} and no rope_theta, or Retrofit, with "
                        f"embed_scale 1 and a rope_theta, but its config.json has embed_scale {scale} and rope_theta "
                        f"{theta}; correct these two (embed_scale is in init_values)")
