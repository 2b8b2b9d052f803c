"""Reading of files, plain or compressed, as bytes and as UTF-8 text, for all readers of text.

A UTF-8 byte-order mark is dropped; a byte-order mark of another encoding is an error.
"""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

from looped.errors import UserError, one_line

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""Exceptions raised for a damaged or unreadable file, compressed or not."""

PART = 1 << 20
"""Bytes of a long text read at once."""

LEAVE_OUT = "leave it out of data.path"
OTHER_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",  # first: one begins with UTF-16's
               codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def _open_zstd(path: Path) -> io.BufferedReader:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
"""Suffix of a compressed file -> its opener."""


def open_bytes(path: Path) -> io.BufferedIOBase:
    """The file opened for bytes, with `peek`, decompressed by its suffix. Errors are among READ_ERRORS."""
    opener = OPENERS.get(path.suffix.lower())
    return path.open("rb") if opener is None else opener(path)


def suffixes_of(path: Path) -> tuple[str, str]:
    """(suffix of the format, suffix of the compression or ""), in lower case."""
    name = Path(path.name.lower())
    return (Path(name.stem).suffix, name.suffix) if name.suffix in OPENERS else (name.suffix, "")


def unreadable(path: Path, error: BaseException) -> UserError:
    """The `UserError` for one of READ_ERRORS."""
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"cannot read {path}: {error.strerror}; check data.path and the file's permissions")
    return UserError(f"{path} is damaged ({one_line(error)}); restore it or {LEAVE_OUT}")


def refuse_other_marks(head: bytes, path: Path | str, way_out: str = LEAVE_OUT) -> None:
    """Raises `UserError` if the first bytes of a file are the byte-order mark of UTF-16 or UTF-32."""
    for mark, coding in OTHER_MARKS.items():
        if head.startswith(mark):
            raise UserError(f"{path} begins with the byte-order mark of {coding.upper()} ({mark.hex(' ')}), but text "
                            f"is read as UTF-8; convert it with iconv -f {coding} -t utf-8, or {way_out}")


class Utf8:
    """Incremental UTF-8 decoder. Newlines are not translated; a byte-order mark at the start is dropped.

    start: number of bytes of the file read before, for the offsets in messages.
    """

    def __init__(self, path: Path | str, *, start: int = 0, way_out: str = LEAVE_OUT):
        self.path = path
        self.fed: int = start
        self.way_out = way_out
        self.decoder: codecs.IncrementalDecoder = codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")()

    def decode(self, raw: bytes, *, final: bool = False) -> str:
        """The text of the next bytes; a character cut at their end is kept back. Raises `UserError` if not UTF-8."""
        if not self.fed:
            refuse_other_marks(raw, self.path, self.way_out)
        self.fed += len(raw)
        try:
            return self.decoder.decode(raw, final)
        except UnicodeDecodeError as error:
            offset = self.fed - len(error.object) + error.start  # error.object is the end of the bytes fed
            raise UserError(f"{self.path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {offset}); "
                            f"convert it, for example with iconv -t utf-8, or {self.way_out}") from None


def is_short(path: Path, limit: int) -> bool:
    """True if a file has at most `limit` bytes, decompressed. Raises `UserError`."""
    try:
        if path.suffix.lower() not in OPENERS:
            return path.stat().st_size <= limit
        with open_bytes(path) as file:
            return len(file.read(limit + 1)) <= limit
    except READ_ERRORS as error:
        raise unreadable(path, error) from None


def read_utf8(path: Path, limit: int) -> str:
    """Up to `limit` bytes of a file as text, ending with a whole character. Raises `UserError`."""
    return "".join(utf8_parts(path, limit))


def utf8_parts(path: Path, limit: int) -> Iterator[str]:
    """Up to `limit` bytes of a file as text in parts of about a megabyte, ending with a whole character. Raises
    `UserError`."""
    utf8, offset = Utf8(path), 0
    try:
        with open_bytes(path) as file:
            while raw := file.read(min(PART, limit + 1 - offset)):
                if not offset:
                    refuse_other_marks(raw, path)  # first: their zeros do not mean a binary file
                if (zero := raw.find(0)) >= 0:
                    raise UserError(f"{path} is binary (a zero byte at offset {offset + zero}); {LEAVE_OUT}")
                offset += len(raw)
                if offset > limit:
                    yield utf8.decode(raw[:-1])
                    return
                yield utf8.decode(raw)
    except READ_ERRORS as error:
        raise unreadable(path, error) from None
    yield utf8.decode(b"", final=True)
