"""The text of a data row: a field of an object, possibly nested (`meta.text`)."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from looped.errors import UserError


class NotRows(UserError):
    """Raised for a row without the text: it is not JSON, not an object, or lacks the field."""


def text_of(row: Any, field: str, where: str) -> str:
    """The text of a row, "" if it is null. Raises `UserError` that lists the row's fields if it lacks this one."""
    if not isinstance(row, Mapping):
        raise NotRows(f"{where} holds {type(row).__name__}, not an object with fields; "
                      f"write one object per line, such as {{\"{field}\": \"...\"}}")
    try:
        value = _find(row, field)
    except KeyError:
        names = list(_names(row))
        near = difflib.get_close_matches(field, names, n=1)
        hint = f"did you mean '{near[0]}'" if near else "set data.text_field to one of them"
        raise NotRows(f"{where} has no field '{field}'; fields: {', '.join(names[:12]) or 'none'}; {hint}") from None
    if value is not None and not isinstance(value, str):
        raise NotRows(f"{where}: field '{field}' holds {type(value).__name__}, not text; "
                      f"set data.text_field to a field of text")
    return value or ""


def column_of(field: str, names: Iterable[str]) -> str | None:
    """The column that holds a field: the one of its name, or of its longest prefix before a dot; None if neither."""
    names = set(names)
    return next((head for head in (field, *(head for head, _ in _cuts(field))) if head in names), None)


def _find(row: Mapping[str, Any], field: str) -> Any:
    """The value of a field; a name that contains the dot takes precedence over a nested field. Raises KeyError."""
    if field in row:
        return row[field]
    for head, tail in _cuts(field):
        if head in row and row[head] is None:
            return None
        if isinstance(row.get(head), Mapping):
            try:
                return _find(row[head], tail)
            except KeyError:
                continue
    raise KeyError(field)


def _cuts(field: str) -> Iterator[tuple[str, str]]:
    """(head, tail) of the field cut at each of its dots, the last one first."""
    for place in range(len(field) - 1, 0, -1):
        if field[place] == ".":
            yield field[:place], field[place + 1 :]


def _names(row: Mapping[str, Any]) -> Iterator[str]:
    """The names of all fields; a nested one as `outer.inner`."""
    for name, value in row.items():
        if isinstance(value, Mapping) and value:
            yield from (f"{name}.{inner}" for inner in _names(value))
        else:
            yield name
