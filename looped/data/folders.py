"""Files that a path means: itself, what a folder holds, what a glob matches; and a count of what is passed over.

Links to folders are followed, but not into a folder that was seen already, nor into one that the link lies in.
"""

import difflib
import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from looped.data.files import suffixes_of
from looped.data.formats import holds_rows, read_file
from looped.errors import UserError

# What a folder is searched for; a file that is named, or matched by a glob, is read whatever its suffix.
FOLDER_SUFFIXES = {
    ".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex", ".html", ".htm", ".xml", ".csv", ".tsv", ".log",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt", ".scala", ".swift", ".js",
    ".ts", ".tsx", ".jsx", ".css", ".rb", ".pl", ".php", ".lua", ".r", ".jl", ".hs", ".ml", ".el", ".lisp", ".sh",
    ".sql", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".jsonl", ".ndjson", ".parquet", ".arrow",
}
HIDDEN = (".", "__pycache__")
CACHES = "cache-"  # how `datasets` names its own intermediate .arrow files

Named = tuple[str, Path]
"""A file, and the name of its documents: its path from where the search began."""


class PassedOver(Counter[str]):
    """Counts of the files, by kind, that a search has left aside."""

    def __str__(self) -> str:
        kinds = (+self).most_common()
        more = sum(count for _, count in kinds[8:])
        return ", ".join(f"{count:,} {kind}" for kind, count in kinds[:8]) + (f", {more:,} others" if more else "")


def find(entry: str, field: str, passed: PassedOver) -> list[Named]:
    """(name, path) of the files that an entry of data.path means, sorted by name. Raises `UserError` for none."""
    path = Path(entry).expanduser()
    if path.is_dir():
        return _in_folder(path, field, passed)
    if path.is_file():
        return [(path.name, path)]
    if glob.has_magic(entry):
        return _in_glob(path)
    problem = "is no regular file" if path.exists() else f"does not exist{_nearest_file(path)}"
    raise UserError(f"data.path {entry} {problem}; name a file, a folder or a glob")


def walk(folder: Path, passed: PassedOver) -> Iterator[Path]:
    """The files below a folder that are not hidden, also those behind links to folders; what is left is counted.

    Raises `UserError` for a folder that cannot be read.
    """
    for parent, files in _folders(folder, passed):
        for name in files:
            if name.startswith("."):
                passed["hidden"] += 1
            else:
                yield Path(parent, name)


def _folders(folder: Path, passed: PassedOver) -> Iterator[tuple[str, list[str]]]:
    """(path, names of its files) of a folder and of all below it, each once, by its own name where it has one."""
    starts, seen = [folder], set()
    while starts:
        for parent, folders, files in os.walk(starts.pop(0), onerror=_refuse):  # links are followed later, by `starts`
            place = Path(os.path.realpath(parent))
            if place in seen:
                folders.clear()
                continue
            seen.add(place)
            shown = sorted(name for name in folders if not name.startswith(HIDDEN))
            passed["hidden"] += len(folders) - len(shown)
            folders[:] = shown
            for link in (path for path in (Path(parent, name) for name in shown) if path.is_symlink()):
                target = Path(os.path.realpath(link))
                if not place.is_relative_to(target):
                    starts.append(link)
                elif target not in seen:
                    passed["links to a folder that they lie in"] += 1
            yield parent, files


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}; check its permissions") from None


def _in_folder(folder: Path, field: str, passed: PassedOver) -> list[Named]:
    found, other, here = [], [], PassedOver()
    for path in walk(folder, here):
        suffix, compression = suffixes_of(path)
        if path.exists() and not path.is_file():
            here["pipe or device"] += 1  # a pipe would be waited for
        elif suffix == ".json":  # rows, or the settings of some program
            (found if holds_rows(path, field) else other).append(path)
        elif suffix in FOLDER_SUFFIXES and not (suffix == ".arrow" and path.name.startswith(CACHES)):
            found.append(path)
        else:
            here[suffix + compression or path.name] += 1
    here[f".json without rows that have '{field}'"] += len(other)
    if not found and other:
        any(read_file(min(other), min(other).name, field=field, limit=1))  # raises: it says what the rows do have
    if not found:
        holds = f"it holds {here}" if +here else "it is empty"
        raise UserError(f"data.path {folder}: no file of text, JSON, parquet or Arrow ({holds}); "
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
    """Paths that a glob matches. The module's own `**` would go round in circles of links."""
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
