"""Documents from files and Hugging Face `datasets`, with a description of how much has been read.

A source yields `Document`s lazily, so a caller that has enough text stops reading. A user's mistake raises one
`UserError` that names the file and the line, byte or field.
"""

import copy
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from looped.config.data import DataConfig
from looped.data.compressed_files import suffixes_of
from looped.data.documents import AnyDocument, Document
from looped.data.formats import DELIMITERS, read_file, table_columns
from looped.data.paths import Named, PassedOver, find
from looped.data.text_field import column_of, text_of
from looped.errors import UserError, one_line, root_cause


class Source:
    """An origin of text. name: its description; notices: one sentence for each thing a user may not expect; key: what
    identifies it on this machine; distinct: no two documents have the same name; opened: how many of its `files` (or
    rows) have been opened; at_hand: its `files` can be listed without a network; by_file: resolved file -> the
    name that its documents have."""

    name: str
    notices: Sequence[str] = ()
    key: Sequence[Any]
    distinct: bool = True
    opened: int = 0
    at_hand: bool = True
    by_file: Mapping[Path, str] = MappingProxyType({})

    @property
    def files(self) -> Sequence[Named] | None:
        """The files that the documents are read from, in order; None if there is no telling, as for a stream."""
        return None

    def renamed(self, names: Mapping[Path, str]) -> "Source":
        """The same source, with these names of its files."""
        return self

    def files_read(self, cut: bool) -> tuple[int, int]:
        """The numbers of `files`, from the first on, that `documents` has opened, and of those that it has read to the
        end; cut: it was left before its end."""
        return self.opened, self.opened - cut

    def documents(self) -> Iterator[AnyDocument]:
        """The documents in reading order, the same at every call. Raises `UserError`."""
        raise NotImplementedError

    def extent(self) -> str:
        """A phrase for messages: how much there is in all, and how much `documents` has opened so far."""
        raise NotImplementedError


class FileSource(Source):
    """The files of paths, folders (searched recursively) and globs, each file once; at most `limit` bytes per text."""

    def __init__(self, paths: Iterable[str], *, field: str, limit: int):
        self.name: str = ", ".join(paths)
        self.key = ("files", *(os.path.abspath(Path(path).expanduser()) for path in paths))
        self.field = field
        self.limit = limit
        self.notices: list[str] = []
        found: dict[Path, Named] = {}
        for entry in paths:
            for name, path in self._find(entry):
                found.setdefault(path.resolve(), (name, path))
        self._hold(found)
        self._note_tables()

    @property
    def files(self) -> Sequence[Named]:
        return self._files

    def renamed(self, names: Mapping[Path, str]) -> "FileSource":
        other, own = copy.copy(self), self.by_file
        mine = {file: name for file, name in names.items() if own.get(file, name) != name}
        other._hold({file: (mine.get(file, name), path)
                     for (file, name), (_, path) in zip(own.items(), self._files, strict=True)})
        other.key = (*self.key, *sorted(mine.values()))
        return other

    def _hold(self, found: Mapping[Path, Named]) -> None:
        self._files: list[Named] = list(found.values())
        self.by_file = {file: name for file, (name, _) in found.items()}
        names = list(self.by_file.values())
        self.distinct = len(set(names)) == len(names) and not any("#" in name for name in names)

    def documents(self) -> Iterator[AnyDocument]:
        self.opened = 0
        for name, path in self._files:
            self.opened += 1
            yield from read_file(path, name, field=self.field, limit=self.limit)

    def extent(self) -> str:
        size = sum(path.stat().st_size for _, path in self._files)
        unopened = len(self._files) - self.opened
        rest = f"{unopened:,} are not read" if unopened else "the last is read in part"
        return f"of {len(self._files):,} files found ({size:,} bytes on disk), {rest}"

    def _find(self, entry: str) -> list[Named]:
        passed = PassedOver()
        found = find(entry, self.field, passed)
        if passed:
            self.notices.append(f"data.path {entry}: skipped {passed}; to read them too, add them or a glob for "
                                f"them to data.path")
        return found

    def _note_tables(self) -> None:
        """Adds a notice for tables that are read as plain text."""
        columns = {name: table_columns(path) for name, path in self._files if suffixes_of(path)[0] in DELIMITERS}
        plain = [name for name, names in columns.items() if self.field not in names]
        if plain:
            self.notices.append(
                f"tables read as plain text, without a column '{self.field}': {len(plain):,}, such as {plain[0]} "
                f"(columns: {', '.join(columns[plain[0]][:8]) or 'none'}); set data.text_field to a column to make "
                f"each row a document")


class DatasetSource(Source):
    """The rows of `datasets.load_dataset(data.dataset, ...)`, in order, from its local copy."""

    at_hand = False

    def __init__(self, data: DataConfig):
        self.data = data
        self.name: str = f"dataset {data.dataset}"
        self.key = ("dataset", data.dataset, data.dataset_config, data.split)
        self.num_rows: int | None = None

    @property
    def files(self) -> Sequence[Named] | None:
        """The Arrow files of the local copy; None for rows that are held in memory."""
        paths = [Path(file["filename"]) for file in getattr(self.rows, "cache_files", [])]
        return [(path.name, path) for path in paths] or None

    def files_read(self, cut: bool) -> tuple[int, int]:
        num = len(self.files or ())
        return num, 0 if cut else num

    def documents(self) -> Iterator[AnyDocument]:
        self.opened = 0
        for number, row in enumerate(self.guarded(self.rows)):
            self.opened += 1
            where = f"data.dataset {self.data.dataset} row {number}"
            yield Document(f"{self.data.split}#{number}", text_of(row, self.data.text_field, where))

    def extent(self) -> str:
        whole = "an unknown number of rows" if self.num_rows is None else f"{self.num_rows:,} rows"
        return f"of {whole}, the first {self.opened:,} are read"

    @cached_property
    def rows(self) -> Any:
        """The dataset, with no column but that of the text. Raises `UserError`."""
        import datasets

        data = self.data
        with self.errors_named():
            rows = datasets.load_dataset(data.dataset, data.dataset_config, split=data.split,
                                         streaming=bool(data.streaming))
            self.num_rows = getattr(rows, "num_rows", None)
            if column := column_of(data.text_field, rows.column_names or ()):
                rows = rows.select_columns([column])  # so that images and audio in other columns stay undecoded
            return rows

    def guarded(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The rows; an error of reading them names the dataset."""
        with self.errors_named():
            yield from rows

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """Turns any error inside the block into a `UserError` that names the dataset."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # load_dataset raises whatever the network, a reader or a builder raises
            raise UserError(f"data.dataset {self.data.dataset} cannot be read ({one_line(root_cause(error))}); check "
                            f"its name, data.dataset_config, data.split and the network, or use data.path") from None


class StreamedSource(DatasetSource):
    """The rows of a dataset that is never stored whole. They arrive once: a file without a name keeps the documents for
    the later readings, and is gone with the process."""

    def __init__(self, data: DataConfig, folder: Path):
        super().__init__(data)
        self.folder = folder
        self._kept: IO[bytes] | None = None
        self._arriving: Iterator[AnyDocument] = iter(())

    @property
    def files(self) -> None:
        return None

    def documents(self) -> Iterator[AnyDocument]:
        if self._kept is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._kept = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115, it is open as long as the source
            self._arriving = super().documents()
        self._kept.seek(0)
        for line in self._kept:
            yield Document(*json.loads(line))
        for document in self._arriving:
            self._kept.write(json.dumps([document.name, document.text]).encode() + b"\n")
            yield document
