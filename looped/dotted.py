"""Classes of one's own by their dotted path, `my.module.MyClass`, looked for in the current folder first."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from looped.errors import UserError


def class_at(path: str, setting: str) -> Any:
    """The object at a dotted path, which is the value of a setting. Raises UserError, also for errors of its module."""
    module, _, name = path.rpartition(".")
    here = os.getcwd()
    try:
        with _beside(here):
            return getattr(importlib.import_module(module), name)
    except Exception as error:  # also what the user's module raises while it runs
        said = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{setting} {path} cannot be imported: {said} (looked in {here}, then among the installed "
                        f"packages); give the dotted path of a class, and start in the folder that holds "
                        f"{module.partition('.')[0]}, or name that folder in PYTHONPATH") from error


@contextmanager
def _beside(folder: str) -> Iterator[None]:
    """Modules of a folder can be imported, first of all as by `python -m`; afterwards, where the class may import its
    neighbours, they come last, so that they hide none of the installed ones."""
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)
    sys.path.append(folder)
