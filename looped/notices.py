"""Notices: each `warnings.warn` printed as one plain line, and written to a run's log.

Python prints a warning with its file, line and source, which mean nothing to the user of a command.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def notice_line(message: Warning | str, category: type[Warning]) -> str:
    """The printed line of a warning; a category other than UserWarning is named."""
    kind = "notice" if category is UserWarning else category.__name__
    return f"{kind}: {' '.join(str(message).split())}"


@contextmanager
def plain_notices() -> Iterator[None]:
    """Print each warning inside the block as one line."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *_, **__: notice_line(message, category) + "\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextmanager
def noted(write: Callable[[str], None]) -> Iterator[None]:
    """Also pass the line of each warning shown inside the block to `write`."""
    shown = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None):
        shown(message, category, filename, lineno, file, line)
        write(notice_line(message, category))

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


@contextmanager
def silent() -> Iterator[None]:
    """Suppress warnings inside the block; they are reported elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
