"""What a page of one file has to be: read as markup, and shown by a browser without a network."""

import base64
import html.parser
import io
import re
import subprocess

from matplotlib.image import imread


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


def first_table(text):
    """The cells of the first table of a file of Markdown: the names of its columns, then its lines."""
    table = next(part for part in text.split("\n\n") if part.startswith("| "))
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return header, *lines


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


def browse(chromium, page, folder, *flags):
    """The output of a browser without a screen (the fixture `chromium`) for a page; it may use no network."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}", *flags, (folder / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def measured(chromium, page, folder):
    """(width of every picture that is shown, 0 for a broken one; by how much the page is wider than a phone).

    The page itself has no script: a copy with one, and without its policy, tells what the browser has made of it.
    """
    told = page.replace("default-src 'none'; img-src data:; style-src 'unsafe-inline'", "img-src data:")
    told = told.replace("</body>", "<script>document.body.dataset.widths = [...document.images].map(i => "
                                   "i.complete && i.naturalWidth);document.body.dataset.wide = "
                                   "document.documentElement.scrollWidth - innerWidth</script></body>")
    shown = browse(chromium, told, folder, "--dump-dom", "--window-size=420,900")
    widths = re.search(r'data-widths="([^"]*)"', shown).group(1).split(",")
    return [int(width) for width in widths], int(re.search(r'data-wide="(-?\d+)"', shown).group(1))
