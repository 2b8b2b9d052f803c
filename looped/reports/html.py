"""Renderer of reports as single HTML files: embedded images, no network, no scripts, light and dark, any screen size.

All text is escaped here, and only here.
"""

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from string import Template
from typing import Any

from looped.reports import sections
from looped.reports.sections import Section, written

DOCUMENT = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5d6873; --paper: #fbfaf8; --card: #fff; --line: #e2dfda;
  --mark: #1b6ca8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --soft: #9aa5af; --paper: #15181b; --card: #1d2125;
  --line: #31373d; --mark: #7fb8e6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 2rem 1.1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; }
p, ul { margin: .5rem 0; max-width: 54rem; }
.soft, figcaption, dt { color: var(--soft); font-size: .92rem; }
.findings { list-style: none; padding: 0; margin: 1.2rem 0; }
.findings li { border-left: 3px solid var(--mark); padding: .1rem 0 .1rem .8rem; margin: .5rem 0; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .45rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; border-top: 0; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
td:first-child { font-weight: 600; }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 8px; padding: .5rem; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 1rem; }
.small { max-width: 44rem; }
details { border-top: 1px solid var(--line); padding: .5rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre, code { font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; margin: .6rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre .prompt { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: .6rem 0; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
</style>
</head>
<body>
$body
</body>
</html>
""")


def page(report: Sequence[Section]) -> str:
    """A complete page; its title is the heading of level 1."""
    title = next(section.text for section in report if section.level == 1)
    return DOCUMENT.substitute(title=escape(title), body=_body(report))


def _body(report: Iterable[Section]) -> str:
    return "\n".join(written(report, WRITERS))


def _bullets(items: Sequence[str], kind: str) -> str:
    lines = "\n".join(f"<li>{escape(item)}</li>" for item in items)
    return lines and f'<ul class="{kind}">\n{lines}\n</ul>'


def _table(table: sections.Table) -> str:
    """A table that scrolls if it is wider than the page."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in table.lines)
    return body and (f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
                     f'<tbody>\n{body}\n</tbody>\n</table></div>')


def _figure(figure: sections.Figure) -> str:
    """An image with its caption, embedded in the page."""
    data = base64.b64encode(figure.path.read_bytes()).decode()
    small = "" if figure.wide else ' class="small"'
    return (f'<figure{small}><img src="data:image/png;base64,{data}" '
            f'alt="{escape(figure.alt)}">\n<figcaption>{escape(figure.caption)}</figcaption></figure>')


def _beside(beside: sections.Beside) -> str:
    """A grid; a single section is rendered without one."""
    parts = written(beside.sections, WRITERS)
    cells = "\n".join(f"<div>{part}</div>" for part in parts)
    return f'<div class="beside">\n{cells}\n</div>' if len(parts) > 1 else "".join(parts)


def _verbatim(verbatim: sections.Verbatim) -> str:
    prompt = f'<span class="prompt">{escape(verbatim.prompt)}</span>' if verbatim.prompt else ""
    return verbatim.text + prompt and f"<pre>{prompt}{escape(verbatim.text)}</pre>"


def _facts(facts: sections.Facts) -> str:
    lines = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.values.items())
    return lines and f"<dl>\n{lines}\n</dl>"


def _folded(folded: sections.Folded) -> str:
    inside = _body(folded.sections)
    return inside and (f"<details{' open' if folded.opened else ''}><summary>{escape(folded.summary)}</summary>\n"
                       f"{inside}\n</details>")


WRITERS: dict[type[Section], Callable[[Any], str]] = {
    sections.Heading: lambda heading: f"<h{heading.level}>{escape(heading.text)}</h{heading.level}>",
    sections.Prose: lambda prose: prose.text and f'<p class="soft">{escape(prose.text)}</p>',
    sections.Bullets: lambda bullets: _bullets(bullets.items, "soft"),
    sections.Findings: lambda findings: _bullets(findings.items, "findings"),
    sections.Table: _table,
    sections.Figure: _figure,
    sections.Beside: _beside,
    sections.Facts: _facts,
    sections.Verbatim: _verbatim,
    sections.Folded: _folded,
}
