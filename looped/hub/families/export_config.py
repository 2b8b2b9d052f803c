"""Check that a model fits the layout of a family, and translation of our settings to its config.json."""

from collections.abc import Collection
from typing import Any

from looped.config import Config
from looped.config.model import ModelConfig
from looped.errors import UserError

SIZES = ("preset", "width", "num_heads", "num_kv_heads", "head_dim", "ffn_width", "num_prelude_layers",
         "num_core_layers", "num_coda_layers", "norm_eps", "rope_base", "rope_scaling", "tie_embeddings",
         "padded_vocab_size", "patch_size", "attention", "state_std")
"""Settings of a model that vary within a family, or do not affect what it computes."""
SCALINGS = {
    "linear": {}, "llama3": {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
                             "original_max_position_embeddings": "original_length"},
    "yarn": {"original_max_position_embeddings": "original_length", "beta_fast": "beta_fast", "beta_slow": "beta_slow",
             "truncate": "truncate", "attention_factor": "attention_factor"}}
"""Kind of scaling -> (their name -> ours)."""
DOCS = "docs/interop.md says which model can go where"


def check_like(config: Config, family: str, free: Collection[str] = SIZES, **wanted: Any) -> None:
    """Raises UserError that names the first setting of a model that does not fit a family: all except the `free` ones
    must equal the family's preset, or `wanted`."""
    own = config.model
    like = ModelConfig(preset=family, width=own.width, num_heads=own.num_heads)
    for name in ModelConfig.model_fields:
        if name in free and name not in wanted:
            continue
        value, needed = getattr(own, name), wanted.get(name, getattr(like, name))
        if value not in (needed if isinstance(needed, tuple) else (needed,)):
            raise UserError(f"model.{name} is {_plain(value)}, but a model of the family {family} has "
                            f"{_plain(needed)}; export it --to hf, or see: {DOCS}")
    if own.core is not None or config.cond_width is not None:
        raise UserError(f"this model has a core that {family} does not have; export it --to hf, or see: {DOCS}")


def _plain(value: Any) -> str:
    parts = value if isinstance(value, tuple) else (value,)
    return " or ".join("null" if part is None else str(part) for part in parts)


def core_layers(config: Config, depth: int) -> list[str]:
    """Our names of the core layers in the order in which `depth` steps run them; blocks run in rotation."""
    sizes = config.block_layers
    found = []
    for step in range(depth):
        block = step % len(sizes)
        found += [f"recurrence.core.blocks.{block}.layers.{number}" for number in range(sizes[block])]
    return found


def rope_parameters(model: ModelConfig) -> dict[str, Any]:
    """Rotary positions as transformers 5 writes them."""
    s = model.rope_scaling
    if s is None:
        return {"rope_theta": model.rope_base, "rope_type": "default"}
    own = {theirs: getattr(s, ours) for theirs, ours in SCALINGS[s.kind].items()}
    return {"rope_theta": model.rope_base, "rope_type": s.kind, "factor": s.factor} | {
        name: value for name, value in own.items() if value is not None}
