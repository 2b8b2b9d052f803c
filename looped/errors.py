"""The one exception type that means "the input is wrong, and here is the way out".

The command line prints its message as a single sentence and exits with code 2; in a library it is an ordinary
`ValueError`. Programming errors stay what they are and keep their tracebacks.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input from the user: a config, a data file, a checkpoint, a flag, a mask or a device."""

    exit_code: int = 2
    """Of the command line; 2 means that the same command fails again."""


KILLED = -9
"""Exit code that subprocess reports for a process ended by SIGKILL; Windows has no such signal."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'width'?"` for the nearest known name, or the list of known names if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else f"; known names: {', '.join(known)}"


def flag_of(name: str) -> str:
    """The command-line option of a field: `--per-token` for `per_token`."""
    return f"--{name.replace('_', '-')}"


def one_line(error: BaseException) -> str:
    """The message of an exception on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def root_cause(error: BaseException) -> BaseException:
    """The first exception in a chain of `raise ... from`."""
    return error if error.__cause__ is None else root_cause(error.__cause__)
