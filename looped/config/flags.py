"""The values of flags: texts as YAML, except that the text of a setting that takes one is taken as it is.

So `--data.path "*.md"`, `"[12].txt"` and `"notes #1.txt"` name files, and `--data.path "[a, b]"`, a list, which that
setting takes, names two.
"""

import typing
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from looped.config.base import Section
from looped.config.files import Repeated, load_yaml
from looped.errors import UserError


def value_of(section: type[Section], name: str, text: str) -> Any:
    """The value of the text given for the setting `name` of a section. Raises UserError."""
    annotation = _annotation_of(section, name)
    literal = _accepts(annotation, text, strict=True) or _accepts(annotation, (text,), strict=True)
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        if literal:
            return text
        way_out = error.problem if isinstance(error, Repeated) else "quote it"
        raise UserError(f"--{name} {text!r} is not a YAML value; {way_out}") from None
    start = text.lstrip()[:1]
    if not literal or start in ("'", '"'):
        return value
    return value if start != "#" and type(value) is not str and _accepts(annotation, value) else text


def _annotation_of(section: Any, name: str) -> Any:
    """The type of a setting, also under a key of a mapping of sections; `Section` if it is unknown or a section."""
    for part in name.split("."):
        fields = getattr(section, "model_fields", {})
        values = typing.get_args(section) if typing.get_origin(section) is dict else ()
        section = fields[part].annotation if part in fields else values[1] if values else Section
    return Section if hasattr(section, "model_fields") else section


def _accepts(annotation: Any, value: Any, strict: bool = False) -> bool:
    try:
        TypeAdapter(annotation).validate_python(value, strict=strict)
    except ValidationError:
        return False
    return True
