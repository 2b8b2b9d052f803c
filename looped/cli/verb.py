"""Base class of the command-line verbs, and parsers for their flags."""

from collections.abc import Mapping

from looped.config import Config
from looped.config.base import MAX_DEPTH
from looped.errors import UserError

Settings = Mapping[str, str]


def no_settings(settings: Settings, verb: str) -> None:
    if settings:
        raise UserError(f"{verb} takes no settings, but got --{next(iter(settings))}")


def parse_depths(text: str, flag: str = "--depths") -> list[int]:
    """Parse `1,2,4` into ascending depths, or other numbers. Raises UserError."""
    try:
        depths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"{flag} {text!r} is not a list of whole numbers; write for instance 1,2,4,8") from None
    for depth in depths:
        check_range(flag, depth)
    return depths


def check_range(flag: str, value: int) -> None:
    if not 1 <= value <= MAX_DEPTH:
        raise UserError(f"{flag} {value} is not between 1 and {MAX_DEPTH}")


def parse_levels(text: str) -> list[int]:
    """Parse `16,32,64` into ascending difficulties of a task. Raises UserError."""
    try:
        levels = sorted({int(part) for part in text.split(",")})
    except ValueError:
        levels = [-1]
    if levels[0] < 0:
        raise UserError(f"--difficulties {text!r} is not a list of whole numbers; write for instance 16,32,64")
    return levels


def costs_of(config: Config) -> str:
    """Parameters, FLOPs and memory of a config, and the sources of its text, in words. Reads no data, only the
    tokenizer if one is to be loaded."""
    from looped.config.unread_settings import num_sequences_of
    from looped.cost.counts import count, format_counts
    from looped.data.from_config import vocab_size_of
    from looped.data.mixture import shares_said

    counts = format_counts(count(config, vocab_size_of(config)))
    return "\n".join([counts, *shares_said(config.data, num_sequences_of(config))])


class Verb:
    """One verb; `settings` are the `--section.key value` flags of the command line."""

    def __call__(self, settings: Settings) -> int | None:
        raise NotImplementedError
