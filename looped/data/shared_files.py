"""Files that several sources of a mixture hold: each has one name in all of them, so that all hold it out or none.

The side of a document depends on its name (`looped.data.corpus.Split`), which is a file's path relative to the folder
of its source: `texts` and `texts/good` would give one file two names, and train on what is held out.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from looped.data.text import FoundText
from looped.data.text_sources import Source
from looped.errors import UserError


def common_names(sources: Iterable[Source]) -> dict[Path, str]:
    """File -> its longest name, for the files to which several sources give different names."""
    names: dict[Path, set[str]] = defaultdict(set)
    for source in sources:
        for file, name in source.by_file.items():
            names[file].add(name)
    return {file: max(given, key=lambda name: (name.count("/"), name))
            for file, given in names.items() if len(given) > 1}


def check_sides(parts: Mapping[str, FoundText]) -> None:
    """Raises `UserError` for a file that one source holds out and another trains on. The common names leave only the
    exceptions of a split: a source of one document, of documents that all fall on one side, and of repeated names."""
    met: dict[Path, tuple[str, str]] = {}
    for name, part in parts.items():
        files = part.reading.source.by_file
        repeated = Counter(files.values())
        for file, called in files.items():
            exception = _exception(part, called, repeated[called] > 1)
            first, before = met.setdefault(file, (name, exception))
            if before != exception:
                raise UserError(f"{file} is in data.mixture.{first} and in data.mixture.{name}, and one would train on "
                                f"what the other holds out ({before or exception}); leave it out of one of them, or "
                                f"give both more files or a higher data.heldout")


def _exception(part: FoundText, name: str, repeated: bool) -> str:
    """The reason for which not the hash of a file's name alone decides its side; "" if it does."""
    split = part.split
    if split.documents == 1:
        return f"a source of one document is cut in two, here after {part.num_bytes:,} bytes in all"
    if split.moved is not None and (split.moved == name or split.moved.startswith((f"{name}#", f"{name}~"))):
        return f"{split.moved} changes sides where all documents of a source would be on one"
    return f"several files of a source are named {name}" if repeated else ""
