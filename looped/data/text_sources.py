"""Documents from files and Hugging Face `datasets`, with a description of how much has been read.

A source yields `Document`s lazily, so a caller that has enough text stops reading. A user's mistake raises one
`UserError` that names the file and the line, byte or field.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from looped.config.data import DataConfig
from looped.data.files import suffixes_of
from looped.data.formats import DELIMITERS, Document, read_file, table_columns
from looped.data.paths import Named, PassedOver, find
from looped.data.text_field import column_of, text_of
from looped.errors import UserError, one_line, root_cause


class Source:
    """An origin of text. name: its description; notices: one sentence for each thing a user may not expect."""

    name: str
    notices: Sequence[str] = ()

    def documents(self) -> Iterator[Document]:
        """The documents in reading order. Raises `UserError`."""
        raise NotImplementedError

    def extent(self) -> str:
        """A phrase for messages: how much there is in all, and how much `documents` has opened so far."""
        raise NotImplementedError


class FileSource(Source):
    """The files of paths, folders (searched recursively) and globs, each file once; at most `limit` bytes per text."""

    def __init__(self, paths: Iterable[str], *, field: str, limit: int):
        self.name: str = ", ".join(paths)
        self.field = field
        self.limit = limit
        self.notices: list[str] = []
        self.opened: int = 0
        found: dict[Path, Named] = {}
        for entry in paths:
            for name, path in self._find(entry):
                found.setdefault(path.resolve(), (name, path))
        self.files: list[Named] = list(found.values())
        self._note_tables()

    def documents(self) -> Iterator[Document]:
        for name, path in self.files:
            self.opened += 1
            yield from read_file(path, name, field=self.field, limit=self.limit)

    def extent(self) -> str:
        size = sum(path.stat().st_size for _, path in self.files)
        unopened = len(self.files) - self.opened
        rest = f"{unopened:,} are not read" if unopened else "the last is read in part"
        return f"of {len(self.files):,} files found ({size:,} bytes on disk), {rest}"

    def _find(self, entry: str) -> list[Named]:
        passed = PassedOver()
        found = find(entry, self.field, passed)
        if passed:
            self.notices.append(f"data.path {entry}: skipped {passed}; to read them too, add them or a glob for "
                                f"them to data.path")
        return found

    def _note_tables(self) -> None:
        """Adds a notice for tables that are read as plain text."""
        columns = {name: table_columns(path) for name, path in self.files if suffixes_of(path)[0] in DELIMITERS}
        plain = [name for name, names in columns.items() if self.field not in names]
        if plain:
            self.notices.append(
                f"tables read as plain text, without a column '{self.field}': {len(plain):,}, such as {plain[0]} "
                f"(columns: {', '.join(columns[plain[0]][:8]) or 'none'}); set data.text_field to a column to make "
                f"each row a document")


class DatasetSource(Source):
    """The rows of `datasets.load_dataset(data.dataset, ...)`, in order, streamed or from its local copy."""

    def __init__(self, data: DataConfig):
        self.data = data
        self.name: str = f"dataset {data.dataset}"
        self.read: int = 0
        self.num_rows: int | None = None

    def documents(self) -> Iterator[Document]:
        for number, row in enumerate(self._rows()):
            self.read += 1
            where = f"data.dataset {self.data.dataset} row {number}"
            yield Document(f"{self.data.split}#{number}", text_of(row, self.data.text_field, where))

    def extent(self) -> str:
        whole = "an unknown number of rows" if self.num_rows is None else f"{self.num_rows:,} rows"
        return f"of {whole}, the first {self.read:,} are read"

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        import datasets

        data = self.data
        try:
            rows = datasets.load_dataset(data.dataset, data.dataset_config, split=data.split, streaming=data.streaming)
            self.num_rows = getattr(rows, "num_rows", None)
            if column := column_of(data.text_field, rows.column_names or ()):
                rows = rows.select_columns([column])  # so that images and audio in other columns stay undecoded
            yield from rows
        except Exception as error:  # load_dataset raises whatever the network, a reader or a builder raises
            raise UserError(f"data.dataset {data.dataset} cannot be read ({one_line(root_cause(error))}); check its "
                            f"name, data.dataset_config, data.split and the network, or use data.path") from None
