"""Documents out of files and of Hugging Face `datasets`: text, JSON lines, parquet, anything `load_dataset` reads.

Every reader yields `Document`s lazily, so a caller that has enough text stops reading. What a user can get wrong ends
in one `UserError` that names the file and the line, byte or field.
"""

import difflib
import glob
import gzip
import itertools
import json
import os
import zlib
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from looped.config_data import DataConfig
from looped.errors import UserError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
# What a folder is searched for; a file that is named, or matched by a glob, is read whatever its suffix.
FOLDER_SUFFIXES = (
    ".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex", ".html", ".htm", ".xml", ".csv", ".tsv", ".log",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt", ".scala", ".swift", ".js",
    ".ts", ".tsx", ".jsx", ".css", ".rb", ".pl", ".php", ".lua", ".r", ".jl", ".hs", ".ml", ".el", ".lisp", ".sh",
    ".sql", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".jsonl", ".ndjson", ".parquet",
)


class Document(NamedTuple):
    """A text and the name it is known by: a relative path, with `#line` or `#row` where a file holds many."""

    name: str
    text: str


def read_paths(paths: Iterable[str], *, field: str, limit: int) -> Iterator[Document]:
    """The documents of files, folders (recursive) and globs, each file once; at most `limit` bytes of a text file."""
    seen = set()
    for entry in paths:
        for name, path in _expand(entry):
            if (key := path.resolve()) not in seen:
                seen.add(key)
                yield from read_file(path, name, field=field, limit=limit)


def read_file(path: Path, name: str, *, field: str, limit: int) -> Iterator[Document]:
    """The documents of one file, by its suffix: JSON lines, parquet (one a row), or text (one a file)."""
    stem = path.name.lower().removesuffix(".gz")
    if stem.endswith(".parquet"):
        yield from _read_parquet(path, name, field)
    elif stem.endswith(JSON_SUFFIXES):
        yield from _read_json_lines(path, name, field)
    else:
        yield Document(name, _read_text(path, limit))


def _expand(entry: str) -> list[tuple[str, Path]]:
    """(name, path) of the files an entry of data.path means, sorted by name."""
    path = Path(entry).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return [(path.name, path)]
    if glob.has_magic(entry):
        return _in_glob(path)
    problem = "is no regular file" if path.exists() else f"does not exist{_nearest_file(path)}"
    raise UserError(f"data.path {entry} {problem}; name a file, a folder or a glob")


def _in_folder(folder: Path) -> list[tuple[str, Path]]:
    found, other = [], set()
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        for path in (Path(parent, name) for name in files if not name.startswith(".")):
            if path.name.lower().removesuffix(".gz").endswith(FOLDER_SUFFIXES):
                found.append((path.relative_to(folder).as_posix(), path))
            else:
                other.add(path.suffix or path.name)
    if not found:
        holds = f"it holds {', '.join(sorted(other)[:8])}" if other else "it is empty"
        raise UserError(f"data.path {folder}: no file of text, JSON lines or parquet ({holds}); "
                        f"name the files, or give a glob such as '{folder}/**/*.txt'")
    return sorted(found)


def _in_glob(pattern: Path) -> list[tuple[str, Path]]:
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    files = [path for path in map(Path, glob.glob(str(pattern), recursive=True)) if path.is_file()]
    if not files:
        raise UserError(f"data.path {pattern} matches no file; check the pattern ('**' matches any number of folders)")
    return sorted((path.relative_to(fixed).as_posix(), path) for path in files)


def _nearest_file(path: Path) -> str:
    try:
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    except OSError:
        return f" (nor does {path.parent})"
    return f" (did you mean {path.parent / near[0]}?)" if near else ""


def _open(path: Path):
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"cannot read {path}: {error.strerror}; check data.path and the file's permissions")
    return UserError(f"{path} is damaged ({one_line(error)}); restore it or leave it out of data.path")


def _read_text(path: Path, limit: int) -> str:
    """Up to `limit` bytes, ending with a whole character, byte for byte as stored (no newline is translated)."""
    try:
        with _open(path) as file:
            raw = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None
    if (zero := raw.find(0)) >= 0:
        raise UserError(f"{path} is binary (a zero byte at offset {zero}); leave it out of data.path")
    try:
        return getincrementaldecoder("utf-8")().decode(raw[:limit], final=len(raw) <= limit)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start}); "
                        f"convert it, for example with iconv -t utf-8, or leave it out of data.path") from None


def _read_json_lines(path: Path, name: str, field: str) -> Iterator[Document]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line.decode("utf-8"))
                    yield Document(f"{name}#{number}", text_of(row, field, f"{path} line {number}"))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} line {number} is not JSON ({one_line(error)}); "
                        f"mend it: one object a line is expected") from None
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None


def _read_parquet(path: Path, name: str, field: str) -> Iterator[Document]:
    for number, row in enumerate(_parquet_rows(path, field)):
        yield Document(f"{name}#{number}", text_of(row, field, f"{path} row {number}"))


def _parquet_rows(path: Path, field: str) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names and file.metadata.num_rows:
                yield dict.fromkeys(names)
                return
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise _unreadable(path, error) from None


def read_dataset(data: DataConfig) -> Iterator[Document]:
    """The rows of `datasets.load_dataset(data.dataset, ...)`, in order, streamed or from its local copy."""
    for number, row in enumerate(_dataset_rows(data)):
        where = f"data.dataset {data.dataset} row {number}"
        yield Document(f"{data.split}#{number}", text_of(row, data.text_field, where))


def _dataset_rows(data: DataConfig) -> Iterator[Mapping[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(data.dataset, data.dataset_config, split=data.split, streaming=data.streaming)
        if data.text_field in (rows.column_names or ()):
            rows = rows.select_columns([data.text_field])  # so that images and audio beside the text stay undecoded
        yield from rows
    except Exception as error:  # load_dataset lets through whatever the network, a reader or a builder raises
        raise UserError(f"data.dataset {data.dataset} cannot be read ({one_line(root_cause(error))}); check its name, "
                        f"data.dataset_config, data.split and the network, or use data.path") from None


def root_cause(error: BaseException) -> BaseException:
    """What an exception was raised from, in the end."""
    return error if error.__cause__ is None else root_cause(error.__cause__)


def text_of(row: Any, field: str, where: str) -> str:
    """The text of a row, "" where it is null; `UserError` with the fields there are if it has no such field."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where} holds {type(row).__name__}, not an object with fields; "
                        f"write one object a line, such as {{\"{field}\": \"...\"}}")
    if field not in row:
        near = difflib.get_close_matches(field, row, n=1)
        hint = f"did you mean '{near[0]}'" if near else "set data.text_field to one of them"
        raise UserError(f"{where} has no field '{field}' but {', '.join(list(row)[:12]) or 'none at all'}; {hint}")
    value = row[field]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: field '{field}' holds {type(value).__name__}, not text; "
                        f"set data.text_field to a field of text")
    return value or ""


def one_line(error: BaseException) -> str:
    """The message of an exception in one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
