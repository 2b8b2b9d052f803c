"""The page holds everything in itself, says what it was given and nothing of it as markup, and a browser shows it."""

import re

import pytest
from matplotlib.figure import Figure as Canvas
from matplotlib.image import imread
from page_checks import browse, check_alone, measured

from looped.reports import html
from looped.reports.sections import (
    Beside,
    Bullets,
    Facts,
    Figure,
    Findings,
    Folded,
    Heading,
    Prose,
    Table,
    Verbatim,
)

EVIL = "<script>alert(1)</script> & \"quoted\" $title ${x} http://example.org </pre>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with a section of every type that is full of what could break it."""
    path = tmp_path_factory.mktemp("page") / "picture.png"
    canvas = Canvas(figsize=(3, 2))
    canvas.add_subplot().plot([1, 2, 3], color="#1b6ca8")
    canvas.savefig(path)
    picture, wide = (Figure(path, f"caption {EVIL}", f"alt {EVIL}", is_wide) for is_wide in (False, True))
    report = [
        Heading(f"title {EVIL}", level=1), Prose(EVIL), Verbatim(f"looped compare {EVIL}"), Findings([EVIL]),
        Folded(f"more {EVIL}", [Findings([EVIL]), Folded(EVIL, [Verbatim(EVIL, prompt=EVIL)])], opened=True),
        Heading(EVIL), Table(["arm", EVIL], [["ar", EVIL], ["denoise", "1.0"]]),
        Beside([picture, picture, Bullets([EVIL])]), picture, wide, Facts({EVIL: EVIL})]
    assert {type(section) for section in report} == html.WRITERS.keys() - {Bullets}
    return html.page(report)


def test_a_page_is_alone_and_its_pictures_decode(page):
    _, pictures = check_alone(page)
    assert len(pictures) == 4


@pytest.mark.parametrize("bad", ['<img src="http://example.org/x.png">', '<script src="data:,x"></script>', "<p>",
                                 '<link rel="stylesheet" href="style.css">', '<p onclick="x()"></p>'])
def test_a_page_that_is_not_alone_is_noticed(page, bad):
    with pytest.raises((AssertionError, IndexError)):
        check_alone(page.replace("</body>", f"{bad}</body>"))


def test_what_the_page_is_given_is_shown_as_it_is(page):
    reader, _ = check_alone(page)
    assert reader.text.count(EVIL) == 20  # the title twice, four captions, and fourteen other places
    assert [tag for tag, _ in reader.tags].count("td") == 4
    assert [attributes["alt"] for tag, attributes in reader.tags if tag == "img"] == [f"alt {EVIL}"] * 4


def test_a_browser_shows_every_picture(page, tmp_path, chromium):
    widths, wide = measured(chromium, page, tmp_path)
    assert widths == [300] * 4
    assert wide <= 0  # on a phone nothing sticks out
    assert set(measured(chromium, re.sub("base64,....", "base64,AAAA", page), tmp_path)[0]) == {0}


@pytest.mark.parametrize(("scheme", "dark"), [("1", False), ("0", True)])
def test_a_browser_paints_the_page_in_light_and_in_dark(page, tmp_path, chromium, scheme, dark):
    browse(chromium, page, tmp_path, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=800,1200",
           f"--blink-settings=preferredColorScheme={scheme}")
    shot = imread(tmp_path / "shot.png")[..., :3]
    assert (shot[:40, :8].mean() < 0.3) == dark  # the margin
    blue = (abs(shot - [0x1B / 255, 0x6C / 255, 0xA8 / 255]) < 0.02).all(-1)
    assert blue.sum() > 100  # the line in the picture


def test_sections_that_hold_nothing_and_their_headings_leave_nothing():
    title = Heading("title", level=1)
    empty = [Heading("gone"), Heading("gone too", level=3), Prose(""), Bullets([]), Findings([]), Table(["gone"], []),
             Beside([Bullets([])]), Verbatim(""), Facts({}), Folded("gone", [Heading("gone"), Folded("gone", [])])]
    said = [Heading("kept"), Prose("said")]
    assert html.page([title, *empty, *said, *empty]) == html.page([title, *said])
    assert "gone" in html.page([title, *empty, Prose("said")])  # the control: the heading of what is said


def test_one_that_stands_beside_nothing_stands_as_if_alone():
    title, said = Heading("title", level=1), Prose("said")
    assert html.page([title, Beside([said, Bullets([])])]) == html.page([title, said])
    assert '<div class="beside">' in html.page([title, Beside([said, said])])


def test_a_fold_is_open_where_it_is_said_to_be():
    folds = [Folded("one", [Prose("1")]), Folded("two", [Prose("2")], opened=True)]
    assert re.findall("<details.*?>", html.page([Heading("title", level=1), *folds])) == ["<details>", "<details open>"]
