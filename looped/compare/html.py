"""The report of a comparison as one page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template

from looped.evaluation.html import Figure, beside, bullets, document, escape, facts, figure, table

FEW = 4
"""Findings that stand open on the page."""
BODY = Template("""<h1>$title</h1>
<p class="soft">$subtitle</p>
<pre>$command</pre>
$findings
<h2>Quality and cost</h2>
$table
<h2>At equal budgets</h2>
<p class="soft">$equal_note</p>
$equal
<div class="beside">
$curves
</div>
$depths
$judged
$arms
<h2>What the figures mean</h2>
$notes
$samples
<h2>Where it was measured</h2>
$facts""")


@dataclass(frozen=True)
class Page:
    """What the page holds, as plain text. `arms`: those with names of their own, in full; `samples`: heading ->
    (prompt, text) pairs; `facts`: name -> value."""

    title: str
    subtitle: str
    command: str
    findings: Sequence[str]
    table: tuple[Sequence[str], Sequence[Sequence[str]]]
    equal: tuple[Sequence[str], Sequence[Sequence[str]]]
    equal_note: str
    judged: tuple[Sequence[str], Sequence[Sequence[str]]] | None
    arms: Mapping[str, str]
    curves: Sequence[Figure]
    depths: Sequence[Figure]
    notes: Sequence[str]
    samples: Mapping[str, Sequence[tuple[str, str]]]
    facts: Mapping[str, str]


def render(page: Page) -> str:
    """The page."""
    return document(page.title, BODY.substitute(
        title=escape(page.title), subtitle=escape(page.subtitle), command=escape(page.command),
        findings=_findings(page.findings), table=table(*page.table),
        equal=table(*page.equal), equal_note=escape(page.equal_note),
        judged="<h2>Samples at equal diversity</h2>\n" + table(*page.judged) if page.judged else "",
        arms=f"<h2>The arms</h2>\n{facts(page.arms)}" if page.arms else "",
        curves="\n".join(map(figure, page.curves)), depths=beside(page.depths),
        notes=bullets(page.notes, 'class="soft"'), samples=_samples(page.samples), facts=facts(page.facts)))


def _findings(findings: Sequence[str]) -> str:
    """The first few, and the others folded below them."""
    few, rest = (bullets(part, 'class="findings"') for part in (findings[:FEW], findings[FEW:]))
    more = len(findings) - FEW
    return f"{few}\n<details><summary>{more} more</summary>\n{rest}\n</details>" if rest else few


def _samples(samples: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    return "<h2>Samples</h2>\n" + "\n".join(
        _sample(heading, pairs, opened=not i) for i, (heading, pairs) in enumerate(samples.items())) if samples else ""


def _sample(heading: str, pairs: Sequence[tuple[str, str]], *, opened: bool) -> str:
    texts = "\n".join(f'<pre><span class="prompt">{escape(prompt)}</span>{escape(text)}</pre>'
                      for prompt, text in pairs)
    return f"<details{' open' if opened else ''}><summary>{escape(heading)}</summary>\n{texts}\n</details>"
