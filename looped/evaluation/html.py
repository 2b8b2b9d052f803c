"""Pages of one file: pictures inside them, no network, no script, in light and dark, on a phone as on a desk.

The pieces return markup. All text is escaped here, and only here.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

escape = html.escape

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
.beside + figure:not(.across), .small { max-width: 44rem; }
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


@dataclass(frozen=True)
class Figure:
    """A picture of the page; `alt` says what it shows to who cannot see it. `wide`: none stands beside it."""

    path: Path
    caption: str
    alt: str
    wide: bool = False


def document(title: str, body: str) -> str:
    """A whole page of a body's markup."""
    return DOCUMENT.substitute(title=escape(title), body=body)


def bullets(items: Sequence[str], attributes: str) -> str:
    """A list; nothing for no items."""
    lines = "\n".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul {attributes}>\n{lines}\n</ul>" if items else ""


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table that scrolls where it is wider than the page."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def figure(shown: Figure) -> str:
    """A picture with its caption, its bytes in the page."""
    data = base64.b64encode(shown.path.read_bytes()).decode()
    across = ' class="across"' if shown.wide else ""
    return (f'<figure{across}><img src="data:image/png;base64,{data}" '
            f'alt="{escape(shown.alt)}">\n<figcaption>{escape(shown.caption)}</figcaption></figure>')


def beside(figures: Sequence[Figure]) -> str:
    """One alone, several beside one another, the wide ones below."""
    narrow, wide = ([figure(shown) for shown in figures if shown.wide == is_wide] for is_wide in (False, True))
    grid = ['<div class="beside">', *narrow, "</div>"] if len(narrow) > 1 else narrow
    return "\n".join([*grid, *wide])


def facts(values: Mapping[str, str]) -> str:
    """Names and values."""
    return "<dl>\n" + "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
                                for name, value in values.items()) + "\n</dl>"
