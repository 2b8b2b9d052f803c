"""`objective auto`: the rule and settings that did best in the measurements on a kind of data (`Kind.auto`)."""

from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

from looped.config.data_kinds import kind_of
from looped.errors import UserError


def chosen(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names and values of the settings that `objective auto` stands for, by the kind of data that the nested
    `values` select. Raises UserError if there are none for it."""
    def named(name: str) -> str | None:
        value = found(values, name)[1]
        return value if isinstance(value, str) else None

    kind = kind_of(SimpleNamespace(task=SimpleNamespace(name=named("task.name")),
                                   images=SimpleNamespace(source=named("images.source"), goal=named("images.goal")),
                                   domain=SimpleNamespace(name=named("domain.name"))))
    if "objective" not in kind.auto:
        raise UserError(f"objective auto is not available for {kind.noun}, since no single rule was best in the "
                        f"measurements; set objective to one of the rules (docs/concepts.md)")
    blocks = found(values, "blocks.num")[1]
    if blocks not in (None, 1):
        raise UserError(f"objective auto is for a core of one block, and blocks.num is {blocks}; set objective to one "
                        f"of the rules, such as blockwise")
    return dict(kind.auto)


def check_not_in(file: Mapping[str, Any], flags: Collection[str], settings: Mapping[str, Any], source: str) -> None:
    """Raises UserError if a `file` has another value of one of the dotted `settings` that `--objective auto` stands
    for, unless it is among the names of the `flags`, or in a section that is."""
    for name, wanted in settings.items():
        place, value = found(file, name)
        flagged = any(f"{name}.".startswith(f"{flag}.") for flag in flags)
        if place is not None and value != wanted and not flagged:
            raise UserError(f"--objective auto stands for {name} {wanted}, and {source} sets {place} {value}; add "
                            f"--{name} {wanted}, or --{place} {value} to keep it")


def over(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings: those of `base`, overridden by those of `values`."""
    merged = dict(base)
    for key, value in values.items():
        before = merged.get(key)
        merged[key] = over(before, value) if isinstance(value, Mapping) and isinstance(before, Mapping) else value
    return merged


def found(values: Mapping[str, Any], name: str) -> tuple[str | None, Any]:
    """(dotted name, value) of a setting in nested values, or of a section above it that is given as a whole, such as
    `denoise.noise paper`; (None, None) if neither is given."""
    value: Any = values
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(value, Mapping):
            return ".".join(parts[:depth]), value
        if value.get(part) is None:
            return None, None
        value = value[part]
    return name, value
