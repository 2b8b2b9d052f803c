"""Standard output whose reader may have gone, as `head` goes, or whose disk may be full."""

import io
import os
import sys
from contextlib import suppress


def leave_stdout() -> None:
    """Send all further output, what is buffered too, nowhere: flushing it at the end would fail again."""
    with suppress(OSError, io.UnsupportedOperation):  # a stream in memory, as in notebooks and tests, has no number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
