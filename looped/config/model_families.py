"""Model families by name: the `model` settings in which each differs from the defaults, without sizes.

    llama, mistral, qwen2, qwen3, olmo2, smollm3     dense models; with an injection, the basis of a looped one
    huginn, retrofit, ouro, nanbeige                 looped models as published
"""

from collections.abc import Mapping
from typing import Any

from looped.errors import did_you_mean

DENSE: dict[str, Any] = {"embed_scale": 1.0, "loop_norm": "none", "tie_embeddings": False}
"""Unscaled, untied embeddings, and no norm but the final one."""
PASSES: dict[str, Any] = {**DENSE, "loop_norm": "each-pass", "injection": "none", "state_init": "embedding",
                          "num_prelude_layers": 0, "num_coda_layers": 0}
"""All layers are in the loop, which starts from the token embeddings and does not inject them again."""

PRESETS: dict[str, dict[str, Any]] = {
    "llama": {**DENSE, "rope_base": 500_000.0, "norm_eps": 1e-5},
    "mistral": {**DENSE, "rope_base": 1_000_000.0, "norm_eps": 1e-5},
    "qwen2": {**DENSE, "rope_base": 1_000_000.0, "attention_bias": "qkv"},
    "qwen3": {**DENSE, "rope_base": 1_000_000.0, "qk_norm": True},
    "olmo2": {**DENSE, "rope_base": 500_000.0, "block": "postnorm", "qk_norm": "whole"},
    "smollm3": {**DENSE, "rope_base": 5_000_000.0, "nope_interval": 4, "tie_embeddings": True},
    # Geiping et al. 2025, arXiv 2502.05171; raven_config_minimal.py of its release.
    "huginn": {"block": "sandwich", "attention_bias": "qk", "rope_base": 50_000.0, "injection": "linear",
               "state_init": "like-init", "num_prelude_layers": 2, "num_core_layers": 4, "num_coda_layers": 2},
    # McLeish et al. 2025, arXiv 2511.07384: layers of a Llama around an adapter, a small random state.
    "retrofit": {**DENSE, "rope_base": 500_000.0, "norm_eps": 1e-5, "injection": "linear", "state_init": "like-init",
                 "state_std": 0.008703882797784892},
    # configuration_ouro.py of ByteDance/Ouro-1.4B, whose loop makes four passes.
    "ouro": {**PASSES, "block": "branch", "rope_base": 1_000_000.0, "exit_gate": True},
    # Nanbeige4.2-3B, arXiv 2607.22083, two passes.
    "nanbeige": {**PASSES, "rope_base": 70_000_000.0},
}


def preset(name: Any) -> dict[str, Any]:
    """The settings of a family. Raises ValueError."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown{did_you_mean(str(name), PRESETS)}")
    return PRESETS[name]


def expanded(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags with `model.preset` replaced by its settings, which the other flags override."""
    name = flags.get("model.preset")
    if name not in PRESETS:
        return dict(flags)
    others = {key: value for key, value in flags.items() if key != "model.preset"}
    return {f"model.{key}": value for key, value in preset(name).items()} | others
