"""Dense stacks in the layout of Llama: Llama, Mistral, Qwen2, Qwen3, OLMo2, SmolLM3; and Nanbeige4.2, a looped one."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from looped.config.presets import PRESETS
from looped.errors import UserError
from looped.hub.families.base import Cut, Family, Names, Raw

PRENORM = {"n1": "input_layernorm", "n3": "post_attention_layernorm"}
POSTNORM = {"n2": "post_attention_layernorm", "n4": "post_feedforward_layernorm"}


def _settings(raw: Raw, folder: str, *, preset: str) -> dict[str, Any]:
    """Those of a preset, with the sizes and the numbers of a config.json."""
    _refuse(raw, folder, hidden_act="silu", mlp_bias=False, skip_loop_final_norm=False)
    rope = raw.get("rope_parameters") or {**(raw.get("rope_scaling") or {}), "rope_theta": raw.get("rope_theta")}
    for name in ("hidden_size", "num_attention_heads", "intermediate_size", "rms_norm_eps"):
        _require(name, raw.get(name), folder)
    _require("rope_theta", rope.get("rope_theta"), folder)  # every family has another default
    found = {
        "preset": preset, "width": raw["hidden_size"], "num_heads": raw["num_attention_heads"],
        "num_kv_heads": raw.get("num_key_value_heads"), "head_dim": raw.get("head_dim"),
        "ffn_width": raw["intermediate_size"], "norm_eps": raw["rms_norm_eps"], "rope_base": rope["rope_theta"],
        "rope_scaling": _scaling(rope, folder), "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "injection": "none", "state_init": "embedding"}
    if "attention_bias" not in PRESETS[preset]:
        _refuse(raw, folder, attention_bias=False)
    passes = raw.get("num_loops", 1)
    return {f"model.{name}": value for name, value in found.items()} | {"objective": "full", "recurrence.mean": passes}


def _require(name: str, value: Any, folder: str) -> None:
    if value is None:
        raise UserError(f"{folder} does not say its {name}, whose default differs from family to family; add it to its "
                        f"config.json")


def _refuse(raw: Raw, folder: str, **wanted: Any) -> None:
    for name, value in wanted.items():
        if raw.get(name, value) != value:
            raise UserError(f"{folder} has {name} {raw[name]!r}, which no model here computes; only {value!r} can be "
                            f"read")


def _scaling(rope: Mapping[str, Any], folder: str) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return {"kind": "linear", "factor": rope["factor"]}
    if kind == "llama3":
        return {"kind": "llama3", "factor": rope["factor"], "low_freq_factor": rope["low_freq_factor"],
                "high_freq_factor": rope["high_freq_factor"],
                "original_length": rope["original_max_position_embeddings"]}
    raise UserError(f"{folder} scales its rotary positions by '{kind}', which is not known here; linear and llama3 are")


def _smollm3(raw: Raw, folder: str) -> dict[str, Any]:
    found, interval = _settings(raw, folder, preset="smollm3"), raw.get("no_rope_layer_interval", 4)
    layers = raw.get("no_rope_layers")
    expected = [int((number + 1) % interval != 0) for number in range(raw["num_hidden_layers"])]
    if layers is not None and list(layers) != expected:
        raise UserError(f"{folder} has no rotary positions in layers of its own choice (no_rope_layers), and only "
                        f"every {interval}th can be read")
    return found | {"model.nope_interval": interval}


def _windowed(settings: Callable[[Raw, str], dict[str, Any]]) -> Callable[[Raw, str], dict[str, Any]]:
    """The settings of a family whose attention may have a window. Raises UserError where it has one."""
    def found(raw: Raw, folder: str) -> dict[str, Any]:
        window = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
        if window is not None:
            raise UserError(f"{folder} attends within a window of {window} tokens, and models here see all earlier "
                            f"ones; set sliding_window to null in its config.json to read it for texts no longer "
                            f"than that")
        return settings(raw, folder)

    return found


def _names(cut: Cut, raw: Raw, *, norms: Mapping[str, str], bias: str = "", qk_norm: bool = False) -> Names:
    found: Names = {"embed.weight": ("model.embed_tokens.weight",)}
    last = "recurrence.core.blocks.0.norm" if raw.get("num_loops") else "norm"
    found[f"{last}.weight"] = ("model.norm.weight",)
    if not raw.get("tie_word_embeddings", False):
        found["head.weight"] = ("lm_head.weight",)
    for ours, number in cut.places():
        theirs = f"model.layers.{number}"
        found |= {f"{ours}.{norm}.weight": (f"{theirs}.{name}.weight",) for norm, name in norms.items()}
        for part, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")):
            found[f"{ours}.attn.{part}.weight"] = (f"{theirs}.self_attn.{name}.weight",)
            if part in bias:
                found[f"{ours}.attn.{part}.bias"] = (f"{theirs}.self_attn.{name}.bias",)
        if qk_norm:
            found |= {f"{ours}.attn.{part}_norm.weight": (f"{theirs}.self_attn.{part}_norm.weight",) for part in "qk"}
        found[f"{ours}.mlp.in_.weight"] = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
        found[f"{ours}.mlp.out.weight"] = (f"{theirs}.mlp.down_proj.weight",)
    return found


DENSE = (
    Family("llama", partial(_settings, preset="llama"), partial(_names, norms=PRENORM)),
    Family("mistral", _windowed(partial(_settings, preset="mistral")), partial(_names, norms=PRENORM)),
    Family("qwen2", _windowed(partial(_settings, preset="qwen2")), partial(_names, norms=PRENORM, bias="qkv")),
    Family("qwen3", _windowed(partial(_settings, preset="qwen3")), partial(_names, norms=PRENORM, qk_norm=True)),
    Family("olmo2", partial(_settings, preset="olmo2"), partial(_names, norms=POSTNORM, qk_norm=True)),
    Family("smollm3", _windowed(_smollm3), partial(_names, norms=PRENORM)),
    Family("nanbeige", partial(_settings, preset="nanbeige"), partial(_names, norms=PRENORM)),
)
