"""Documents: a name and a text, in memory, or read from its file in parts whenever it is asked for.

Both kinds have `name`, `text`, `parts()`, `named` and `between`; the functions below need no more than the parts, and
no more memory than one of them.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from looped.errors import UserError

PIECE = 1 << 20
"""Characters encoded at once: a tokenizer's working memory is many times its input."""


class Document(NamedTuple):
    """A text and its name: a relative path, with `#line` or `#row` if the file holds several."""

    name: str
    text: str

    def parts(self) -> Iterator[str]:
        """The text in order, here in one part."""
        yield self.text

    def named(self, name: str) -> "Document":
        return Document(name, self.text)

    def between(self, start: int, stop: int) -> "Document":
        """The characters start ... stop - 1."""
        return Document(self.name, self.text[start:stop])


class LongDocument:
    """A document that is too long to be held; `read` opens its text, in parts, of which characters from `start` to
    `stop` - 1 count."""

    def __init__(self, name: str, read: Callable[[], Iterator[str]], start: int = 0, stop: int | None = None):
        self.name = name
        self.read = read
        self.start = start
        self.stop = stop

    @property
    def text(self) -> str:
        """The whole text, in memory."""
        return "".join(self.parts())

    def parts(self) -> Iterator[str]:
        """The text in order, in parts of any length but 0."""
        at = 0
        for part in self.read():
            if self.stop is not None and at >= self.stop:
                return
            kept = part[max(self.start - at, 0) : None if self.stop is None else self.stop - at]
            at += len(part)
            if kept:
                yield kept

    def named(self, name: str) -> "LongDocument":
        return LongDocument(name, self.read, self.start, self.stop)

    def between(self, start: int, stop: int) -> "LongDocument":
        """The characters start ... stop - 1."""
        return LongDocument(self.name, self.read, self.start + start, self.start + stop)


AnyDocument = Document | LongDocument


def size_of(document: AnyDocument) -> int:
    """Bytes of the text in UTF-8. Raises `UserError` for a lone surrogate, which has none."""
    try:
        return sum(len(part.encode("utf-8")) for part in document.parts())
    except UnicodeEncodeError as error:
        raise UserError(f"document {document.name} is not valid Unicode (a lone surrogate at character {error.start}); "
                        f"fix it or leave it out") from None


def characters_in(document: AnyDocument, num_bytes: int) -> int:
    """The number of whole characters in the first bytes of the text."""
    characters = 0
    for part in document.parts():
        raw = part.encode("utf-8")
        if len(raw) > num_bytes:
            return characters + len(raw[:num_bytes].decode("utf-8", errors="ignore"))
        characters, num_bytes = characters + len(part), num_bytes - len(raw)
    return characters


def pieces_of(parts: Iterable[str], size: int | None = None) -> Iterator[str]:
    """A text, given in parts, in pieces of at most `size` (PIECE) characters, cut after a line break if possible; the
    pieces do not depend on the parts. An empty text is one empty piece."""
    held, size = "", size or PIECE
    for part in parts:
        held, start = held + part, 0
        while len(held) - start > size:
            cut = held.rfind("\n", start, start + size) + 1 or start + size
            yield held[start:cut]
            start = cut
        held = held[start:]
    yield held


def cut_in_two(document: AnyDocument, share: float) -> tuple[AnyDocument, AnyDocument]:
    """(head, tail) of a document, the tail about a fraction `share` of it, cut at a line break if one is near. Raises
    `UserError` for a single character."""
    length = sum(len(part) for part in document.parts())
    middle = min(max(round(length * (1 - share)), 1), length - 1)
    if middle < 1:
        raise UserError(f"{document.name} is the only document and too short to split ({length} character); "
                        f"point data.path or data.dataset to more text")
    near = (length - middle) // 2  # a line break farther off would change the split too much
    before = behind = at = 0
    for part in document.parts():
        low, here, high = (max(place - at, 0) for place in (middle - near, middle, middle + near))
        if (found := part.rfind("\n", low, here)) >= 0:
            before = at + found + 1
        if not behind and (found := part.find("\n", here, high)) >= 0:
            behind = at + found + 1
        at += len(part)
    cut = min((place for place in (before, behind) if place), key=lambda place: abs(place - middle), default=middle)
    return (document.between(0, cut).named(f"{document.name} (head)"),
            document.between(cut, length).named(f"{document.name} (tail)"))
