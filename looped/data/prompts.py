"""Prompts from a file (one per line), from a pipe, or from the command line.

Only a line feed ends a prompt: form feeds, U+0085 and U+2028 are text, and so is a carriage return without a line feed.
Empty lines are skipped with a warning.
"""

import warnings
from io import BufferedIOBase
from pathlib import Path

from looped.data.compressed_files import Utf8
from looped.errors import UserError

WAY_OUT = "give a UTF-8 text file with one prompt per line"


def read_prompts(path: Path) -> list[str]:
    """The non-empty lines of a file, without line feed or CR LF. Raises `UserError`, also if there are none."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read --prompts {path}: {error.strerror or error}; {WAY_OUT}") from None
    *lines, last = Utf8(f"--prompts {path}", way_out=WAY_OUT).decode(raw, final=True).split("\n")
    lines = [line.removesuffix("\r") for line in lines] + [last] * bool(last)
    if not any(lines):
        raise UserError(f"--prompts {path} has no prompts; write one per line")
    if empty := [str(number) for number, line in enumerate(lines, start=1) if not line]:
        more = ", ..." if len(empty) > 5 else ""
        warnings.warn(f"--prompts {path}: skipped empty lines: {', '.join(empty[:5])}{more}",
                      stacklevel=2)
    return [line for line in lines if line]


def read_piped(stream: BufferedIOBase) -> str:
    """All of standard input as one prompt, byte for byte. Raises `UserError` if it is not UTF-8."""
    return Utf8("--prompt -", way_out="pipe UTF-8 text").decode(stream.read(), final=True)


def check_prompt(text: str) -> str:
    """The text of --prompt. Raises `UserError` for bytes of the command line that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"--prompt is not UTF-8 (at character {error.start}); give it in UTF-8, or in a file with "
                        f"--prompts") from None
    return text
