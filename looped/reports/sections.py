"""Sections of a report, in plain text. The same list is rendered as an HTML page, as Markdown and on a terminal.

    report = [Heading("Two arms", level=1), Findings(["denoise is ahead"]), Table(["arm", "loss"], [["ar", "3.1"]])]
    markdown(report, folder), page(report)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTENT = 7
"""Level of a section that is not a heading; it belongs to any heading above it."""


class Section:
    """A part of a report. A renderer has one writer per type, and omits empty sections."""

    level = CONTENT


@dataclass(frozen=True)
class Heading(Section):
    """The title of the report (level 1) or of the sections that follow; omitted if none follow."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Prose(Section):
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets(Section):
    """A list of explanatory sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Findings(Bullets):
    """The main results, one sentence each."""


@dataclass(frozen=True)
class Table(Section):
    """A header and lines of equally many cells; the first column labels the line."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure(Section):
    """An image (PNG). `alt`: its text alternative; `wide`: as wide as the page."""

    path: Path
    caption: str
    alt: str
    wide: bool = False


@dataclass(frozen=True)
class Beside(Section):
    """Sections side by side if the page is wide enough."""

    sections: Sequence[Section]


@dataclass(frozen=True)
class Facts(Section):
    """A list of names and values."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Verbatim(Section):
    """A command line or a generated sample, verbatim; a sample continues its prompt."""

    text: str
    prompt: str = ""


@dataclass(frozen=True)
class Folded(Section):
    """Collapsible sections under a summary line."""

    summary: str
    sections: Sequence[Section]
    opened: bool = False


def written(report: Iterable[Section], writers: Mapping[type[Section], Callable[..., str]], *context: Any) -> list[str]:
    """The text of each section from the writer of its type, without empty sections and headings without content."""
    parts, follows = [], 0
    for section in reversed(list(report)):
        text = writers[type(section)](section, *context)
        if text and (section.level == CONTENT or section.level < follows):
            parts.append(text)
            follows = section.level
    return parts[::-1]
