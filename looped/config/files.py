"""Reading of YAML files and their validation as settings; each error is one sentence with the fix."""

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from looped.config.base import Section
from looped.errors import UserError, did_you_mean

Read = TypeVar("Read", bound=Section)


def read_yaml(path: Path, what: str = "config", folder: str = "configs") -> dict[str, Any]:
    """The settings of a YAML file. `what` and `folder` (of examples) word the error. Raises UserError."""
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror or error}; check the path, or start from one in "
                        f"{folder}/") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{what} {path} is not YAML{f' (line {mark.line + 1})' if mark else ''}: {problem}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{what} {path} holds a {type(values).__name__}, not settings; start from one in {folder}/")
    if odd := [key for key in values if not isinstance(key, str)]:
        raise UserError(f"{what} {path} has the key {odd[0]!r}, which is no name of a setting; remove it (YAML "
                        f"reads on, off, yes and no as true and false)")
    return values


class Repeated(yaml.MarkedYAMLError):
    """A key that is given twice in a mapping."""


class Loader(yaml.SafeLoader):
    """PyYAML's loader, which keeps the last of several equal keys, with an error for them."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, met = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:  # as written: what `<<` merges, which may be set again, is added later
            if (name := (key.tag, str(key.value))) in met:
                raise Repeated(problem=f"'{key.value}' is set a second time; keep one", problem_mark=key.start_mark)
            met.add(name)
        return node


def load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError, for a key that is given twice too."""
    return yaml.load(text, Loader)


def validated(section: type[Read], values: Mapping[str, Any], source: str) -> Read:
    """The section with these values. Raises UserError for the first invalid one; `source`: their origin, for its text.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_problem(section, error)}") from None


def _first_problem(section: type[Section], error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    problem = problems[0]
    location = [part for part in problem["loc"] if not str(part).startswith("function-")]
    name = ".".join(str(part) for part in location)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown setting '{name}'{did_you_mean(str(location[-1]), _known_names(section, location[:-1]))}{more}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    got = "" if problem["type"] == "value_error" else f" (got {_shorten(problem['input'])})"
    return f"{name}: {message}{got}{more}" if name else f"{message}{more}"


def _known_names(section: Any, location: Sequence) -> list[str]:
    """Names of the settings at a location: in a nested section, under a key of a mapping, or at an index of a list."""
    for part in location:
        fields = getattr(section, "model_fields", {})
        section = fields[part].annotation if part in fields else _section_of(section)
        if isinstance(section, types.UnionType):
            section = _section_of(section)
    return list(section.model_fields)


def _section_of(annotation: Any) -> type[Section]:
    return next(option for option in typing.get_args(annotation)
                if isinstance(option, type) and issubclass(option, Section))


def _shorten(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
