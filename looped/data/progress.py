"""Progress of long work on text: a bar on the terminal, and nothing where stderr is none."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(work: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts bytes done towards `total`; work: what is done, as in "encoding"."""
    if not sys.stderr.isatty():
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(work, total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)
