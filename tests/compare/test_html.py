"""The page holds everything in itself, says what it was given and nothing of it as markup, and a browser shows it."""

import re

import pytest
from matplotlib.figure import Figure as Canvas
from matplotlib.image import imread
from page_checks import browse, check_alone, measured

from looped.compare.html import Figure, Page, render

EVIL = "<script>alert(1)</script> & \"quoted\" $title ${x} http://example.org </pre>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page that is full of what could break it."""
    path = tmp_path_factory.mktemp("page") / "picture.png"
    canvas = Canvas(figsize=(3, 2))
    canvas.add_subplot().plot([1, 2, 3], color="#1b6ca8")
    canvas.savefig(path)
    picture = Figure(path, f"caption {EVIL}", f"alt {EVIL}")
    return render(Page(title=f"title {EVIL}", subtitle="sub", command=f"looped compare {EVIL}", findings=[EVIL],
                       table=(["arm", EVIL], [["ar", EVIL], ["denoise", "1.0"]]),
                       equal=(["arm"], [["ar"]]), equal_note=EVIL, judged=(["arm"], [["ar"]]), arms={EVIL: EVIL},
                       curves=[picture] * 3, depths=[picture], notes=[EVIL], samples={f"ar {EVIL}": [(EVIL, EVIL)]},
                       facts={EVIL: EVIL}))


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
    assert reader.text.count(EVIL) == 19  # the title twice, four captions, and thirteen other places
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("td") == 4 + 1 + 1
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
