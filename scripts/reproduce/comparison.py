"""What the scripts of this folder share: their command line, one `looped compare` as a command, and its rows.

A script is run as a file, and this one is then found beside it.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from looped.cli import split_settings
from looped.compare.summary import Spread
from looped.errors import UserError, did_you_mean


def parser_of(script: str, doc: str | None, scales: Mapping[str, Any], *, jobs: int = 2) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--scale", choices=scales, default="cpu")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of every arm")
    parser.add_argument("--jobs", type=int, default=jobs, help="runs at once; they should not share a processor")
    parser.add_argument("--out", type=Path, help=f"folder of all; runs/{script.replace('_', '-')}-<scale> if not given")
    return parser


def run_script(script: str, parser: argparse.ArgumentParser,
               reproduce: Callable[[argparse.Namespace, dict[str, str]], int], *, own: Collection[str] = ()) -> int:
    """`reproduce(options, settings of looped train)`: its exit code, or 2 and a sentence for what cannot be. `own`:
    settings that every arm has for itself, so that one for all of them would be lost."""
    args, rest = parser.parse_known_args()
    args.out = args.out or Path("runs") / f"{script.replace('_', '-')}-{args.scale}"
    try:
        unknown, settings = split_settings(rest)
        if unknown:
            raise UserError(f"{' '.join(unknown)} is neither an option of this script nor a setting; see --help")
        for name in own:
            if name in settings:
                raise UserError(f"--{name} {settings[name]} would be lost, since every arm of this script has its own; "
                                f"leave it out, or give the arms to `looped compare`")
        return reproduce(args, settings)
    except UserError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2


def chosen(text: str, known: Mapping[str, Any]) -> list[str]:
    """Names of a comma-separated list. Raises UserError."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"'{name}' is not among {', '.join(known)}{did_you_mean(name, known)}")
    return list(dict.fromkeys(names))


def compare_command(config: Path, options: Mapping[str, Any], flags: Mapping[str, Any]) -> list[str]:
    """`looped compare` with its options and the settings that all arms share."""
    return [sys.executable, "-m", "looped.cli", "compare", str(config),
            *(word for name, value in options.items() for word in (f"--{name}", str(value))), *flag_words(flags)]


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Settings as a command line has them."""
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in flags.items()]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Those of a comparison."""
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def spread_of(row: Mapping[str, Any]) -> Spread | None:
    """Of a row, which leaves out what is not known."""
    return Spread(row["mean"], row.get("sd", math.nan), row["num"]) if row["num"] else None
