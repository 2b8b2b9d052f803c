"""The page holds everything in itself, says what it was given and nothing of it as markup, and a browser shows it."""

import base64
import html.parser
import io
import re
import shutil
import subprocess

import pytest
from matplotlib.figure import Figure as Canvas
from matplotlib.image import imread

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
                       table=(["arm", EVIL], [["ar", EVIL], ["denoise", "1.0"]]), judged=(["arm"], [["ar"]]),
                       curves=[picture] * 3, depths=[picture], notes=[EVIL], samples={f"ar {EVIL}": [(EVIL, EVIL)]},
                       facts={EVIL: EVIL}))


class Reader(html.parser.HTMLParser):
    """Tags with their attributes, the text, and whether every tag that is opened is closed."""

    VOID = {"meta", "link", "img"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check_alone(text):
    """Nothing is fetched: no script, no address in an attribute or a style but data: ones; pictures decode."""
    reader = Reader(text)
    assert reader.open == []
    assert "script" not in [tag for tag, _ in reader.tags]
    for tag, attributes in reader.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "data", "action", "poster", "background"):
                assert value.startswith("data:"), (tag, name, value[:80])
            assert not name.startswith("on")
            assert name in ("alt", "content") or "http" not in (value or "")
    style = re.search(r"<style>(.*?)</style>", text, flags=re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    pictures = [attributes["src"] for tag, attributes in reader.tags if tag == "img"]
    for source in pictures:
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert data.startswith(b"\x89PNG")
        assert imread(io.BytesIO(data)).std() > 0
    return reader, pictures


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
    assert reader.text.count(EVIL) == 16  # the title twice, four captions, and ten other places
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("td") == 4 + 1
    assert [attributes["alt"] for tag, attributes in reader.tags if tag == "img"] == [f"alt {EVIL}"] * 4


def test_a_real_report_is_alone(done):
    reader, pictures = check_alone((done / "report.html").read_text())
    assert len(pictures) == 4
    assert all(word in reader.text for word in ("nats a token", "torch", "denoise, seed 0, depth 2", "distinct-2"))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(page, folder, *flags):
    """What a browser without a screen makes of a page; it may use no network."""
    (folder / "page.html").write_text(page)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}", *flags, (folder / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_shows_every_picture(page, tmp_path):
    """The page itself has no script: a copy with one, and without its policy, tells what the browser has made of it."""
    told = page.replace("default-src 'none'; img-src data:; style-src 'unsafe-inline'", "img-src data:")
    told = told.replace("</body>", "<script>document.body.dataset.widths = [...document.images].map(i => "
                                   "i.complete && i.naturalWidth);document.body.dataset.wide = "
                                   "document.documentElement.scrollWidth - innerWidth</script></body>")
    shown = browse(told, tmp_path, "--dump-dom", "--window-size=420,900")
    widths = re.search(r'data-widths="([^"]*)"', shown).group(1).split(",")
    assert [int(width) for width in widths] == [300] * 4
    assert int(re.search(r'data-wide="(-?\d+)"', shown).group(1)) <= 0  # on a phone nothing sticks out
    broken = browse(re.sub("base64,....", "base64,AAAA", told), tmp_path, "--dump-dom")
    assert set(re.search(r'data-widths="([^"]*)"', broken).group(1).split(",")) == {"0"}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize(("scheme", "dark"), [("1", False), ("0", True)])
def test_a_browser_paints_the_page_in_light_and_in_dark(page, tmp_path, scheme, dark):
    browse(page, tmp_path, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=800,1200",
           f"--blink-settings=preferredColorScheme={scheme}")
    shot = imread(tmp_path / "shot.png")[..., :3]
    assert (shot[:40, :8].mean() < 0.3) == dark  # the margin
    blue = (abs(shot - [0x1B / 255, 0x6C / 255, 0xA8 / 255]) < 0.02).all(-1)
    assert blue.sum() > 100  # the line in the picture
