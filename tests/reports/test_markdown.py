"""Markdown says what a report says and takes none of it for its own signs; a terminal has it without pictures."""

import re

import pytest

from looped.reports.html import WRITERS as OF_HTML
from looped.reports.markdown import WRITERS, markdown, markdown_table
from looped.reports.sections import (
    Beside,
    Bullets,
    Facts,
    Figure,
    Findings,
    Folded,
    Heading,
    Prose,
    Section,
    Table,
    Verbatim,
)

EVIL = "a | b\n# c <img src=x> </details> <!-- d"
SAID = r"a | b # c \<img src=x> \</details> \<!-- d"


def test_every_type_of_section_has_a_writer_in_both_renderers():
    def below(kind):
        return {each for sub in kind.__subclasses__() for each in (sub, *below(sub))}

    assert WRITERS.keys() == OF_HTML.keys() == below(Section)


@pytest.mark.parametrize(("section", "said"), [
    (Heading(EVIL, level=3), f"### {SAID}"), (Bullets([EVIL, "e"]), f"- {SAID}\n- e"), (Findings([EVIL]), f"- {SAID}"),
    (Facts({EVIL: EVIL}), f"- {SAID}: {SAID}"), (Prose("a\nb <b>c</b> 1 < 2"), "a\nb \\<b>c\\</b> 1 < 2"),
    (Folded(EVIL, [Folded("e", [Prose("f")])]), f"{SAID}:\n\ne:\n\nf"),
    (Beside([Prose("a"), Prose("b")]), "a\n\nb"),
])
def test_no_text_is_taken_for_markup(tmp_path, section, said):
    follows = [Prose("end")]
    assert markdown([section, *follows], tmp_path) == f"{said}\n\nend"


def test_pipes_and_line_breaks_stay_within_their_cells():
    lines = markdown_table(["arm", "a|b"], [[EVIL, "1\r\n2"], ["x", "3"]]).splitlines()
    assert len(lines) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {3}
    assert {len(line) for line in lines} == {len(lines[0])}
    assert lines[1].endswith("-:|")  # figures to the right
    assert r"1 2 |" in lines[2]


@pytest.mark.parametrize("ticks", ["", "``", "```", "`````"])
def test_a_text_stands_between_fences_that_it_does_not_close(tmp_path, ticks):
    first, *inside, last = markdown([Verbatim(f"{EVIL}\n{ticks}\n", prompt="before ")], tmp_path).splitlines()
    assert first == last == "`" * max(3, len(ticks) + 1)
    assert inside == f"before {EVIL}\n{ticks}\n".split("\n")


def test_pictures_are_links_from_the_folder_of_the_file(tmp_path):
    figure = Figure(tmp_path / "out" / "plots" / "a (1).png", "caption", "alt [x] \\ y")
    assert markdown([figure], tmp_path / "out") == "![alt \\[x\\] \\\\ y](plots/a%20%281%29.png)\n\ncaption"
    assert "(../out/plots/" in markdown([figure], tmp_path / "elsewhere")


def test_sections_that_hold_nothing_and_their_headings_leave_nothing(tmp_path):
    empty = [Heading("gone"), Prose(""), Bullets([]), Table(["gone"], []), Beside([Facts({})]), Verbatim(""),
             Folded("gone", [Heading("gone"), Folded("gone", [Findings([])])])]
    assert markdown([*empty, Heading("kept"), Prose("said"), *empty], tmp_path) == "## kept\n\nsaid"
    assert "gone" in markdown([*empty, Prose("said")], tmp_path)  # the control: the heading of what is said


def test_a_terminal_has_the_report_without_what_only_a_file_can_show(tmp_path):
    for_files = [Figure(tmp_path / "a.png", "caption", "alt"), Facts({"name": "value"}), Verbatim("text")]
    report = [Heading("title", level=1), Prose("said"), Heading("files"), Beside(for_files), Folded("more", for_files)]
    assert markdown(report) == "# title\n\nsaid"
    assert all(word in markdown(report, tmp_path) for word in ("files", "a.png", "name: value", "text", "more"))
