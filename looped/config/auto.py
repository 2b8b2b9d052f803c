"""`objective auto`: the training rule, with its settings, that was measured best for a kind of data (`Kind.auto`)."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from looped.config.base import Section
from looped.config.data_kinds import kind_of
from looped.errors import UserError

AUTO = "auto"


def chosen(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names and values of the settings that `objective auto` stands for, by the kind of data that the nested
    `values` select. Raises UserError if none was measured for it."""
    def named(section: str, *names: str) -> SimpleNamespace:
        given = _plain(values.get(section))
        return SimpleNamespace(**{name: given.get(name) if isinstance(given, Mapping) else None for name in names})

    kind = kind_of(SimpleNamespace(task=named("task", "name"), images=named("images", "source", "goal"),
                                   domain=named("domain", "name")))
    if not kind.auto:
        raise UserError(f"objective auto stands for no rule on {kind.noun}, for which none was measured to be the best "
                        f"throughout; set objective to a rule (docs/concepts.md has a table)")
    return dict(kind.auto)


def over(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings: those of `base`, with those of `values` in their place."""
    merged = dict(base)
    for key, value in values.items():
        value, before = _plain(value), merged.get(key)
        merged[key] = over(before, value) if isinstance(value, Mapping) and isinstance(before, Mapping) else value
    return merged


def _plain(value: Any) -> Any:
    """A section as a mapping of the settings that were given to it; anything else as it is."""
    return value.model_dump(exclude_unset=True) if isinstance(value, Section) else value
