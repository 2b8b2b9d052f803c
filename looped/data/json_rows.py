"""Streaming reader of JSON rows: one value per line, the elements of one array, or objects spread over several lines.

The file is read in pieces and a row is yielded as soon as it is complete, so an array of any size takes the memory of
one row.
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from looped.data.compressed_files import READ_ERRORS, Utf8, open_bytes, refuse_other_marks, unreadable
from looped.data.text_field import NotRows
from looped.errors import one_line

PIECE = 1 << 16  # bytes read at once
SPACE = re.compile(r"[ \t\n\r]*")
NUMBER = re.compile(r"[0-9.eE+-]*")
DECODER = json.JSONDecoder()
LONGEST_WORD = len("-Infinity")  # cut off by the end of a piece, it is reported as an error at its start


def json_rows(path: Path) -> Iterator[tuple[str, int, Any]]:
    """("line" or "row", its number, value) of every row; lines count from 1, rows of an array or of objects from 0.

    Raises `NotRows` for text that is not JSON, with its line, and `UserError` for a damaged file.
    """
    try:
        with open_bytes(path) as file:
            first, line, start = _skip_blank(file, path)
            if first == b"[":
                values = _Values(path, line, _pieces(file, Utf8(path, start=start)))
                yield from (("row", number, value) for number, value in enumerate(values.of_array()))
            elif first:
                yield from _lines_or_objects(file, path, line, start)
    except READ_ERRORS as error:
        raise unreadable(path, error) from None


def _skip_blank(file: BufferedIOBase, path: Path) -> tuple[bytes, int, int]:
    """(first non-space byte, or b"" if there is none; its line; its offset), with the file positioned before it.
    A byte-order mark is skipped too."""
    line, offset = 1, 0
    while head := file.peek(1):
        if not offset:
            refuse_other_marks(head, path)
        blank = len(head) - len(head.removeprefix(b"" if offset else codecs.BOM_UTF8).lstrip())
        line, offset = line + head.count(b"\n", 0, blank), offset + blank
        file.read(blank)
        if blank < len(head):
            return head[blank : blank + 1], line, offset
    return b"", line, offset


def _lines_or_objects(file: BufferedIOBase, path: Path, line: int, start: int) -> Iterator[tuple[str, int, Any]]:
    """One value per line if the first line is a complete value; objects over several lines if it ends too early."""
    head = file.readline()
    if _goes_on(head):
        rest = _pieces(file, Utf8(path, start=start + len(head)))
        values = _Values(path, line, itertools.chain([head.decode("utf-8")], rest))
        yield from (("row", number, value) for number, value in enumerate(values.of_objects()))
        return
    for number, text in enumerate(itertools.chain([head], file), start=line):
        if text.strip():
            yield "line", number, _loads(text, path, number)


def _goes_on(line: bytes) -> bool:
    """True if a line is the beginning of an incomplete value."""
    try:
        json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc.rstrip())
    except (ValueError, RecursionError):
        pass
    return False


def _loads(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _not_json(path, number, one_line(error)) from None


def _not_json(path: Path, line: int, problem: str) -> NotRows:
    return NotRows(f"{path} line {line} is not JSON ({problem}); fix it: one object per line is expected, or one array "
                   f"of objects")


def _pieces(file: BufferedIOBase, utf8: Utf8) -> Iterator[str]:
    while raw := file.read(PIECE):
        yield utf8.decode(raw)
    yield utf8.decode(b"", final=True)


class _Values:
    """Incremental parser of JSON values from pieces of text; line: the line number of the first piece."""

    def __init__(self, path: Path, line: int, pieces: Iterator[str]):
        self.path, self.line, self.pieces = path, line, pieces
        self.text, self.at = "", 0

    def of_array(self) -> Iterator[Any]:
        """The elements of a text that is one array."""
        self._next()
        self.at += 1  # past the bracket
        mark = self._next()
        while mark != "]":
            yield self._value()
            mark = self._next()
            if mark not in (",", "]"):
                raise self._fault(self.at, "Expecting ',' delimiter" if mark else "the array has no end")
            self.at += mark == ","
        self.at += 1
        if self._next():
            raise self._fault(self.at, "Extra data after the array")

    def of_objects(self) -> Iterator[Any]:
        """Consecutive values, separated by whitespace only."""
        while self._next():
            yield self._value()

    def _next(self) -> str:
        """The next non-space character, not consumed; "" at the end of the text."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if NUMBER.match(self.text, end).end() < len(self.text) or not self._more():  # else it may continue
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos + LONGEST_WORD >= len(self.text)
                if not cut or not self._more():
                    raise self._fault(error.pos, error.msg) from None
            except (ValueError, RecursionError) as error:  # too many digits, too deep
                raise self._fault(self.at, one_line(error)) from None

    def _more(self) -> bool:
        """Doubles the unparsed text, so that a long value is not decoded too often; False at the end of the file."""
        waiting, parts, size = len(self.text) - self.at, [], 0
        for piece in self.pieces:
            parts.append(piece)
            size += len(piece)
            if size > waiting:
                break
        if not size:
            return False
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :] + "".join(parts), 0
        return True

    def _fault(self, place: int, problem: str) -> NotRows:
        return _not_json(self.path, self.line + self.text.count("\n", 0, place), problem)
