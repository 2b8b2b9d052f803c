"""Files selected by an entry of data.path (a file, a folder or a glob), and a count of the files skipped.

Links to folders are followed, except into a folder already visited or one that contains the link. The folder of a run
is skipped unless it is the entry itself, since training writes to it.
"""

import difflib
import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from looped.data.compressed_files import suffixes_of
from looped.data.formats import holds_rows, read_file
from looped.errors import UserError

# Suffixes that a folder is searched for; a file given by name or by a glob is read whatever its suffix.
FOLDER_SUFFIXES = {
    ".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex", ".html", ".htm", ".xml", ".csv", ".tsv", ".log",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt", ".scala", ".swift", ".js",
    ".ts", ".tsx", ".jsx", ".css", ".rb", ".pl", ".php", ".lua", ".r", ".jl", ".hs", ".ml", ".el", ".lisp", ".sh",
    ".sql", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".jsonl", ".ndjson", ".parquet", ".arrow",
}
HIDDEN = (".", "__pycache__")
OF_A_RUN = {"config.yaml", "stamp.json"}
CACHES = "cache-"  # prefix of the intermediate .arrow files of `datasets`

Named = tuple[str, Path]
"""(name of a file's documents: its path relative to the start of the search, the file)."""


class PassedOver(Counter[str]):
    """Counts of the files that a search skipped, by kind."""

    def __str__(self) -> str:
        kinds = (+self).most_common()
        more = sum(count for _, count in kinds[8:])
        return ", ".join(f"{count:,} {kind}" for kind, count in kinds[:8]) + (f", {more:,} others" if more else "")


def find(entry: str, field: str, passed: PassedOver) -> list[Named]:
    """(name, path) of the files that an entry of data.path selects, sorted. Raises `UserError` if there are none."""
    path = Path(entry).expanduser()
    if path.is_dir():
        return _in_folder(path, field, passed)
    if path.is_file():
        return [(path.name, path)]
    if glob.has_magic(entry):
        return _in_glob(path)
    problem = "is not a regular file" if path.exists() else f"does not exist{_nearest_file(path)}"
    raise UserError(f"data.path {entry} {problem}; name a file, a folder or a glob")


def walk(folder: Path, passed: PassedOver) -> Iterator[Path]:
    """Files below a folder that are not hidden, also behind links to folders; skipped ones are counted in `passed`.

    Raises `UserError` for a folder that cannot be read.
    """
    for parent, files in _folders(folder, passed):
        for name in files:
            if name.startswith("."):
                passed["hidden"] += 1
            else:
                yield Path(parent, name)


def _folders(folder: Path, passed: PassedOver) -> Iterator[tuple[str, list[str]]]:
    """(path, file names) of a folder and all below it, each once, if possible under its own path, not a link's."""
    starts, seen = [folder], set()
    while starts:
        for parent, folders, files in os.walk(starts.pop(0), onerror=_refuse):  # links are followed later, by `starts`
            place = Path(os.path.realpath(parent))
            if place in seen:
                folders.clear()
                continue
            seen.add(place)
            if OF_A_RUN.issubset(files) and Path(parent) != folder:
                passed["folders of runs"] += 1
                folders.clear()
                continue
            shown = sorted(name for name in folders if not name.startswith(HIDDEN))
            passed["hidden"] += len(folders) - len(shown)
            folders[:] = shown
            for link in (path for path in (Path(parent, name) for name in shown) if path.is_symlink()):
                target = Path(os.path.realpath(link))
                if not place.is_relative_to(target):
                    starts.append(link)
                elif target not in seen:
                    passed["links to a folder that contains them"] += 1
            yield parent, files


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}; check its permissions") from None


def _in_folder(folder: Path, field: str, passed: PassedOver) -> list[Named]:
    found, other, here = [], [], PassedOver()
    for path in walk(folder, here):
        suffix, compression = suffixes_of(path)
        if path.exists() and not path.is_file():
            here["pipe or device"] += 1  # reading a pipe would block
        elif suffix == ".json":  # rows, or the settings of some program
            (found if holds_rows(path, field) else other).append(path)
        elif suffix in FOLDER_SUFFIXES and not (suffix == ".arrow" and path.name.startswith(CACHES)):
            found.append(path)
        else:
            here[suffix + compression or path.name] += 1
    here[f".json without rows with a field '{field}'"] += len(other)
    if not found and other:
        any(read_file(min(other), min(other).name, field=field, limit=1))  # raises, and lists the fields there are
    if not found:
        holds = f"it holds {here}" if +here else "it is empty"
        raise UserError(f"data.path {folder}: no text, JSON, parquet or Arrow file ({holds}); "
                        f"name the files, or give a glob such as '{folder}/**/*.txt'")
    passed.update(+here)
    return sorted((path.relative_to(folder).as_posix(), path) for path in found)


def _in_glob(pattern: Path) -> list[Named]:
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    files = [path for path in map(Path, _matches(pattern)) if path.is_file()]
    if not files:
        raise UserError(f"data.path {pattern} matches no file; check the pattern ('**' matches any number of folders)")
    return sorted((path.relative_to(fixed).as_posix(), path) for path in files)


def _matches(pattern: Path) -> Iterator[str]:
    """Paths that a glob matches. The `**` of Python's glob would walk circular links again and again."""
    head, tail = pattern.parts, ()
    if "**" in head:
        place = head.index("**")
        head, tail = head[:place], head[place + 1 :] or ("*",)
    for start in glob.glob(str(Path(*head))):
        if tail and os.path.isdir(start):
            for folder, _ in _folders(Path(start), PassedOver()):
                yield from _matches(Path(glob.escape(folder), *tail))
        elif not tail:
            yield start


def _nearest_file(path: Path) -> str:
    try:
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    except OSError:
        return f" (nor does {path.parent})"
    return f" (did you mean {path.parent / near[0]}?)" if near else ""
