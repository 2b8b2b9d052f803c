"""Renderer of reports as Markdown that is also readable as plain text, for files and for the terminal."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from looped.reports import sections
from looped.reports.sections import Section, written


def markdown(report: Iterable[Section], folder: Path | None = None) -> str:
    """The report as Markdown. With `folder`: for a file there, with links to images relative to it. Without: for a
    terminal, which omits images, facts, commands and samples."""
    return "\n\n".join(written(report, ON_A_TERMINAL if folder is None else WRITERS, folder))


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table with the first column left-aligned, the others right-aligned, and cells padded to equal width."""
    lines = [[_line(cell).replace("|", r"\|") for cell in line] for line in (header, *lines)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["| " + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                              for i, (cell, w) in enumerate(zip(line, widths, strict=True))) + " |" for line in lines]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def _plain(text: str) -> str:
    """Text with `<` escaped wherever Markdown would read a tag."""
    return re.sub(r"<(?=[A-Za-z/!?])", r"\\<", text)


def _line(text: str) -> str:
    return re.sub(r"\s*[\r\n]+\s*", " ", _plain(text))


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {_line(item)}" for item in items)


def _fenced(text: str) -> str:
    """Verbatim text, between fences longer than any in it."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return text and f"{fence}\n{text}\n{fence}"


def _figure(figure: sections.Figure, folder: Path) -> str:
    alt = _line(re.sub(r"[][\\]", r"\\\g<0>", figure.alt))
    return f"![{alt}]({quote(Path(os.path.relpath(figure.path, folder)).as_posix())})\n\n{_line(figure.caption)}"


def _folded(folded: sections.Folded, folder: Path | None) -> str:
    inside = markdown(folded.sections, folder)
    return inside and f"{_line(folded.summary)}:\n\n{inside}"


WRITERS: dict[type[Section], Callable[[Any, Any], str]] = {
    sections.Heading: lambda heading, _: f"{'#' * heading.level} {_line(heading.text)}",
    sections.Prose: lambda prose, _: _plain(prose.text),
    sections.Bullets: lambda bullets, _: _bullets(bullets.items),
    sections.Findings: lambda findings, _: _bullets(findings.items),
    sections.Table: lambda table, _: markdown_table(table.header, table.lines) if table.lines else "",
    sections.Figure: _figure,
    sections.Beside: lambda beside, folder: markdown(beside.sections, folder),
    sections.Verbatim: lambda verbatim, _: _fenced(verbatim.prompt + verbatim.text),
    sections.Facts: lambda facts, _: _bullets(f"{name}: {value}" for name, value in facts.values.items()),
    sections.Folded: _folded,
}
ON_A_TERMINAL: dict[type[sections.Section], Callable[..., str]] = WRITERS | dict.fromkeys(
    (sections.Figure, sections.Verbatim, sections.Facts), lambda section, _: "")
