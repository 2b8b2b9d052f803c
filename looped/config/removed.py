"""Removed settings, each with the reason; a config that has them at their old defaults still loads."""

from collections.abc import Mapping
from typing import Any

from looped.errors import UserError

REMOVED: dict[str, tuple[Any, str]] = {
    "denoise.noise.share_per_token": (0.0, "sequences with one level per token did not train better; denoise.order "
                                           "gives each token of a block its own level"),
    "denoise.next_token_weight": (0.0, "the plain loss competed with the denoising loss; train objective ar first, and "
                                       "start from its weights by training.warm_start"),
}
"""Setting -> (old default, reason for the removal and replacement)."""

REMOVED_VALUES: dict[tuple[str, Any], str] = {
    ("blocks.shared", "per-block"): "separate embeddings, prelude and coda per block multiplied their memory and were "
                                    "never measured to be better; set it to frozen or with-block",
}
"""(Setting, removed value) -> reason for the removal and replacement."""


def without_removed(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A copy of nested settings without the removed ones. Raises UserError if a removed one is not at its default."""
    kept = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            kept[key] = without_removed(value, f"{name}.")
        elif name in REMOVED:
            usual, what = REMOVED[name]
            if value != usual:
                raise UserError(f"{name} {value} was removed: {what}")
        elif isinstance(value, str) and (name, value) in REMOVED_VALUES:
            raise UserError(f"{name} {value} was removed: {REMOVED_VALUES[name, value]}")
        else:
            kept[key] = value
    return kept
