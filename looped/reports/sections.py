"""Reports as lists of sections, in plain text: a page, a file of Markdown and a terminal show the same list.

    report = [Heading("Two arms", level=1), Findings(["denoise is ahead"]), Table(["arm", "loss"], [["ar", "3.1"]])]
    markdown(report, folder), page(report)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTENT = 7
"""The level of all that is no heading: it belongs to any heading above it."""


class Section:
    """A part of a report. A renderer has a writer for each type, and leaves out sections that hold nothing."""

    level = CONTENT


@dataclass(frozen=True)
class Heading(Section):
    """The title of a report, at level 1, or of what follows it; left out where nothing does."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Prose(Section):
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets(Section):
    """Sentences that explain."""

    items: Sequence[str]


@dataclass(frozen=True)
class Findings(Bullets):
    """Sentences that a reader looks for first."""


@dataclass(frozen=True)
class Table(Section):
    """A line of names and lines of as many cells; the first column says what the others are of."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure(Section):
    """A picture (PNG); `alt` says what it shows to who cannot see it. `wide`: as wide as the page."""

    path: Path
    caption: str
    alt: str
    wide: bool = False


@dataclass(frozen=True)
class Beside(Section):
    """Sections beside one another where there is room."""

    sections: Sequence[Section]


@dataclass(frozen=True)
class Facts(Section):
    """Names and values."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Verbatim(Section):
    """A command line or a sample, letter by letter; a sample goes on from its prompt."""

    text: str
    prompt: str = ""


@dataclass(frozen=True)
class Folded(Section):
    """Sections that a reader opens, under a line that says what they are."""

    summary: str
    sections: Sequence[Section]
    opened: bool = False


def written(report: Iterable[Section], writers: Mapping[type[Section], Callable[..., str]], *context: Any) -> list[str]:
    """Each section by the writer of its type, without those that hold nothing and headings that are followed by
    none."""
    parts, follows = [], 0
    for section in reversed(list(report)):
        text = writers[type(section)](section, *context)
        if text and (section.level == CONTENT or section.level < follows):
            parts.append(text)
            follows = section.level
    return parts[::-1]
