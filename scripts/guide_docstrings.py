"""Griffe extension for the API pages (see mkdocs.yml): docstrings as they read well on a page.

Docstrings describe arguments and fields in running text, `mean: ... backprop: ...`, which suits an editor; on a page
each becomes an item of a list. Indented lines become blocks of code. Base classes of no interest are left out.
"""

import ast
import re
from collections.abc import Iterable
from itertools import groupby
from textwrap import dedent

import griffe

SILENT = ("Section", "NamedTuple", "Protocol", "object")
"""Bases that tell a reader nothing."""
SENTENCE = re.compile(r"(?<=\.) (?=[A-Z`])(?!None|True|False)")
"""The end of the last item: descriptions of names are in lower case."""


class Listed(griffe.Extension):
    """Rewrites the docstrings of a package after it has been parsed."""

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        for each in objects(pkg):
            if each.docstring is not None:
                each.docstring.value = for_page(each.docstring.value, names_of(each))
            if each.is_class:
                each.bases = [base for base in each.bases if str(base) not in SILENT]


def objects(parent: griffe.Object) -> Iterable[griffe.Object]:
    """An object and everything that it defines."""
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from objects(member)


def names_of(described: griffe.Object) -> list[str]:
    """The names that a docstring may describe: parameters of a function; attributes and parameters of a class."""
    found = [parameter.name for parameter in getattr(described, "parameters", ())]
    if described.is_class:
        found += [name for name, member in described.all_members.items() if member.is_attribute]
    return [name for name in found if name != "self"]


def for_page(docstring: str, names: Iterable[str]) -> str:
    """The docstring with indented paragraphs as code, and those that describe two names or more as lists."""
    one = rf"`?(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True))) or '(?!)'})`?"
    item = re.compile(rf"(?:^|(?<=[.;] ))({one}(?:, {one})*(?: \([^()]*\))?): ")
    pages = []
    for is_code, group in groupby(re.split(r"\n\n+", docstring), key=lambda part: part.startswith("    ")):
        parts = list(group)
        pages += [_fenced("\n\n".join(parts))] if is_code else [_listed(part, item) for part in parts]
    return "\n\n".join(pages)


def _fenced(part: str) -> str:
    lines = dedent(part).rstrip()
    try:
        ast.parse(lines)
    except SyntaxError:
        return f"```text\n{lines}\n```"
    return f"```python\n{lines}\n```"


def _listed(paragraph: str, item: re.Pattern[str]) -> str:
    lead, *parts = item.split(" ".join(paragraph.split()))
    if len(parts) < 4:  # two names and their texts
        return paragraph
    texts, (last, *rest) = parts[1:-1:2], SENTENCE.split(parts[-1], maxsplit=1)
    lines = [f"- {_as_code(name)}: {text.strip().rstrip(';')}"
             for name, text in zip(parts[::2], [*texts, last], strict=True)]
    return "\n\n".join(filter(None, [lead.strip(), "\n".join(lines), *rest]))


def _as_code(described: str) -> str:
    """Names in backticks, with the shape after them, if there is one, as it is."""
    names, bracket, shape = described.partition(" (")
    return ", ".join(f"`{name.strip('`')}`" for name in names.split(", ")) + bracket + shape
