"""Readers for the documents of one file, chosen by its suffix: text, JSON, CSV, parquet or Arrow, maybe compressed.

Readers are lazy, so a caller that has enough text stops reading. A user's mistake raises one `UserError` that names the
file and the line, byte or field.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from looped.data.compressed_files import (
    LEAVE_OUT,
    READ_ERRORS,
    is_short,
    open_bytes,
    read_utf8,
    suffixes_of,
    unreadable,
    utf8_parts,
)
from looped.data.documents import AnyDocument, Document, LongDocument
from looped.data.json_rows import json_rows
from looped.data.text_field import NotRows, column_of, text_of
from looped.errors import UserError

LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8."""

HEADER = 1 << 16
"""Maximum size of a CSV file's header line, in bytes."""

LONG = 1 << 25
"""Bytes of a text file beyond which it is read in parts."""

CSV_BLOCK = 1 << 24
"""Maximum size of a row of a CSV file, in bytes; also the size of a read."""


class File(NamedTuple):
    """A file to read: its path, the name of its documents, the field that holds their text, and the maximum number of
    bytes of text wanted."""

    path: Path
    name: str
    field: str
    limit: int

    def document(self, row: Any, kind: str, number: int) -> Document:
        """The document in a row or a line of the file; kind: "row" or "line"."""
        return Document(f"{self.name}#{number}", text_of(row, self.field, f"{self.path} {kind} {number}"))


def read_file(path: Path, name: str, *, field: str, limit: int) -> Iterator[AnyDocument]:
    """The documents of one file, by its suffix: JSON, CSV, parquet, Arrow (one per row), or text (one per file).

    A text longer than `limit` bytes is cut a little beyond them, so that the caller can tell.
    """
    return READERS.get(suffixes_of(path)[0], _read_text)(File(path, name, field, limit))


def holds_rows(path: Path, field: str) -> bool:
    """True if the first row of a JSON file has the field. Raises `UserError` for a damaged file."""
    try:
        return next(_read_json(File(path, path.name, field, 0)), None) is not None
    except NotRows:
        return False


def table_columns(path: Path) -> list[str]:
    """The names in the first row of a CSV or TSV file. Raises `UserError` for a damaged file."""
    try:
        with open_bytes(path) as file:
            head = file.read(HEADER).decode("utf-8-sig", errors="replace")
        return next(csv.reader(io.StringIO(head, newline=""), delimiter=DELIMITERS[suffixes_of(path)[0]]), [])
    except csv.Error:
        return []
    except READ_ERRORS as error:
        raise unreadable(path, error) from None


def _read_text(file: File) -> Iterator[AnyDocument]:
    limit = file.limit + LONGEST_CHARACTER
    if limit <= LONG or is_short(file.path, LONG):
        yield Document(file.name, read_utf8(file.path, limit))
    else:
        yield LongDocument(file.name, lambda: utf8_parts(file.path, limit))


def _read_json(file: File) -> Iterator[Document]:
    for kind, number, row in json_rows(file.path):
        yield file.document(row, kind, number)


def _read_table(file: File) -> Iterator[AnyDocument]:
    """One document per row if a column is named like the field; else the file is plain text."""
    if file.field not in table_columns(file.path):
        yield from _read_text(file)
        return
    import pyarrow.csv

    with _errors_named(file.path), open_bytes(file.path) as source:
        reader = pyarrow.csv.open_csv(
            source, read_options=pyarrow.csv.ReadOptions(block_size=CSV_BLOCK, use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(delimiter=DELIMITERS[suffixes_of(file.path)[0]],
                                                   newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(include_columns=[file.field],
                                                       column_types={file.field: pyarrow.string()}))
        yield from _documents(file, reader)


def _read_parquet(file: File) -> Iterator[Document]:
    import pyarrow.parquet

    _refuse_compressed(file.path)
    with _errors_named(file.path), pyarrow.parquet.ParquetFile(file.path) as parquet:
        schema, names = parquet.schema_arrow, list(_column_names(parquet.schema_arrow))
        column = file.field if file.field in names else column_of(file.field, schema.names)
        if column is not None:
            yield from _documents(file, parquet.iter_batches(batch_size=1024, columns=[column]))
        elif parquet.metadata.num_rows:
            file.document(dict.fromkeys(names), "row", 0)  # raises


def _read_arrow(file: File) -> Iterator[Document]:
    """Both Arrow formats: the stream format, which `save_to_disk` of `datasets` writes, and the file format."""
    import pyarrow.ipc

    _refuse_compressed(file.path)
    with _errors_named(file.path), pyarrow.memory_map(str(file.path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        column = column_of(file.field, reader.schema.names)
        if column is not None:
            yield from _documents(file, (batch.select([column]) for batch in batches))
        elif any(batch.num_rows for batch in batches):
            file.document(dict.fromkeys(_column_names(reader.schema)), "row", 0)  # raises


READERS: dict[str, Callable[[File], Iterator[AnyDocument]]] = {
    ".jsonl": _read_json, ".ndjson": _read_json, ".json": _read_json, ".csv": _read_table, ".tsv": _read_table,
    ".parquet": _read_parquet, ".arrow": _read_arrow,
}
"""Suffix -> reader; any other suffix is plain text."""

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def _documents(file: File, batches: Iterable[Any]) -> Iterator[Document]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield file.document(row, "row", number)
            number += 1


def _column_names(fields: Iterable[Any]) -> Iterator[str]:
    """Column names of an Arrow schema or struct; a field of a struct is named `struct.field`."""
    import pyarrow

    for field in fields:
        if pyarrow.types.is_struct(field.type) and field.type.num_fields:
            yield from (f"{field.name}.{inner}" for inner in _column_names(field.type))
        else:
            yield field.name


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Turns every exception of pyarrow for a damaged file into a `UserError`."""
    import pyarrow

    try:
        yield
    except UserError:
        raise
    except (pyarrow.ArrowException, *READ_ERRORS, ValueError, MemoryError, OverflowError) as error:
        raise unreadable(path, error) from None


def _refuse_compressed(path: Path) -> None:
    if compression := suffixes_of(path)[1]:
        raise UserError(f"{path} is compressed as a whole ({compression}), but column files are read in parts; "
                        f"decompress it or {LEAVE_OUT}")
