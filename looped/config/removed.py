"""Settings that were removed, with a sentence on each; a config that has them at their old defaults is read as ever.
"""

from collections.abc import Mapping
from typing import Any

from looped.errors import UserError

REMOVED: dict[str, tuple[Any, str]] = {
    "denoise.noise.share_per_token": (0.0, "sequences with a level for each token were trained no better; "
                                           "denoise.order gives each token of a block a level of its own"),
    "denoise.next_token_weight": (0.0, "the plain loss competed with the denoising loss; train objective ar first, and "
                                       "begin with its weights by training.warm_start"),
}
"""Setting -> its old default, and what became of it."""

REMOVED_VALUES: dict[tuple[str, Any], str] = {
    ("blocks.shared", "per-block"): "blocks with embeddings, prelude and coda of their own took that memory several "
                                    "times and were never measured to be better; set it to frozen or with-block",
}
"""A setting and a value that it had -> what became of that."""


def without_removed(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A copy of nested settings without those that were removed. Raises UserError where one of them was set."""
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
