"""Custom classes by their dotted path, `my.module.MyClass`, searched for in the current folder first."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from looped.errors import UserError


def class_at(path: str, setting: str) -> Any:
    """The object at the dotted path given by a setting. Raises UserError, also for errors raised by its module."""
    module, _, name = path.rpartition(".")
    here = os.getcwd()
    try:
        with _importable(here):
            return getattr(importlib.import_module(module), name)
    except Exception as error:  # also what the user's module raises while it runs
        said = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{setting} {path} cannot be imported: {said} (looked in {here}, then among the installed "
                        f"packages); give the dotted path of a class, and start in the folder that holds "
                        f"{module.partition('.')[0]}, or add that folder to PYTHONPATH") from error


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Put a folder first on the import path inside the block, as `python -m` does, and last afterwards: the class may
    still import its neighbours, but they hide no installed module."""
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
