"""Notices: what `warnings.warn` says, as one line each for people, and in a run's log.

Python prints a warning with the file, line and source that it came from, which says nothing to who runs a command.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def notice_line(message: Warning | str, category: type[Warning]) -> str:
    """The line for people; a category that is not the usual one is named."""
    kind = "notice" if category is UserWarning else category.__name__
    return f"{kind}: {' '.join(str(message).split())}"


@contextmanager
def plain_notices() -> Iterator[None]:
    """Within, warnings are printed as one line each."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *_, **__: notice_line(message, category) + "\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextmanager
def noted(write: Callable[[str], None]) -> Iterator[None]:
    """Within, the line of each warning that is shown goes to `write` as well."""
    shown = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None):
        shown(message, category, filename, lineno, file, line)
        write(notice_line(message, category))

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown
