"""Manifest of a source's files, beside the token cache: the facts about its text that are known without reading it.

    <cache>/.manifests/<key>.json    {"files": [[name, size, mtime_ns, sha256], ...], "noted_ns": ..., "known": {...}}

`key` is the hash of the source and of the settings that `known` depends on, and `name` a file's path relative to the
source. A file of the same size and time of change is taken to be the same and is not read; any other is hashed, and the
manifest holds if its content is the same. No content depends on the times.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from looped.atomic_files import lock_for, write_text
from looped.data.paths import Named

FOLDER = ".manifests"

SETTLED = 2_000_000_000
"""Nanoseconds after which a file that is changed again surely has another time of change, on any file system."""

State = list[Any]
"""[name, size, mtime_ns, sha256]; sha256 is None for a file that was read in part, which its state alone can vouch for.
"""


def remembered(folder: Path, key: Sequence[Any], files: Sequence[Named] | None,
               read: Callable[[], tuple[Mapping[str, Any], int, int]]) -> Mapping[str, Any]:
    """The known facts about the text in `files`: from its manifest in `folder` if that holds, else by `read`.

    Of several processes one reads, and the others wait for its manifest. Without files, or where the folder cannot be
    written, `read` is called every time. read: returns what it finds (as JSON has it), how many of the files, from
    the first on, it depends on, and how many of these are read to the end. Only those are hashed.
    """
    if files is None:
        return read()[0]
    path = _path(folder, key)
    if (known := _recall(path, files)) is not None:
        return known
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_for(path.with_suffix(".lock")))
            if (known := _recall(path, files)) is not None:
                return known
            begun, before = time.time_ns(), [_state(named) for named in files]
        except OSError:
            return read()[0]
        known, opened, whole = read()
        with suppress(OSError):
            states = [[*before[number], sha256_of(files[number][1]) if number < whole else None]
                      for number in range(opened)]
            if before == [_state(named) for named in files]:  # else it was written to meanwhile
                _write(path, states, len(files), begun, known)
        return known


def recall(folder: Path, key: Sequence[Any], files: Sequence[Named] | None) -> Mapping[str, Any] | None:
    """The known facts about the text in `files`, from its manifest; None if there is none that holds."""
    return None if files is None else _recall(_path(folder, key), files)


def _path(folder: Path, key: Sequence[Any]) -> Path:
    return folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"


def _recall(path: Path, files: Sequence[Named]) -> Mapping[str, Any] | None:
    """The facts in a manifest, None if it is not there or does not hold."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["num_files"] != len(files):
            return None
        now, begun = [], time.time_ns()
        for state, named in zip(manifest["files"], files, strict=False):
            now.append(_same(state, named, manifest["noted_ns"]))
        if now != manifest["files"] or any(state[2] >= manifest["noted_ns"] - SETTLED for state in now):
            with suppress(OSError):
                _write(path, now, len(files), begun, manifest["known"])
        return manifest["known"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _same(state: State, named: Named, noted_ns: int) -> State:
    """The state of a file now. Raises ValueError if its content has changed."""
    now, sha256 = _state(named), state[3]
    if now == state[:3] and now[2] < noted_ns - SETTLED:
        return state
    if now[:2] != state[:2] or sha256 is None or sha256_of(named[1]) != sha256:
        raise ValueError(f"{named[1]} has changed")
    return [*now, sha256]


def _state(named: Named) -> State:
    name, path = named
    found = path.stat()
    return [os.fsencode(name).decode("utf-8", "backslashreplace"), found.st_size, found.st_mtime_ns]


def _write(path: Path, states: Sequence[State], num_files: int, noted_ns: int, known: Mapping[str, Any]) -> None:
    write_text(path, json.dumps({"files": states, "num_files": num_files, "noted_ns": noted_ns, "known": known}))


def sha256_of(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
