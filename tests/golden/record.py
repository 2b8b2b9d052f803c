"""Record the golden net anew: python tests/golden/record.py [NAME ...], all cases if none is named.

A recording is a statement that figures were meant to change: it comes in a commit of its own that says which and why.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from cases import CASES, write
from observed import kernels, observe

RECORDED = Path(__file__).parent / "recorded"


def path_of(name: str) -> Path:
    """The file of a case."""
    return RECORDED / f"{name.replace(', ', '-').replace(' ', '-')}.json"


def observed(name: str, folder: Path) -> dict:
    """The record of a case, run in a folder of its own."""
    write(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        return json.loads(json.dumps(observe(CASES[name], folder)))
    finally:
        os.chdir(before)


def dump(found: dict) -> str:
    """JSON with one line per row, so that a change can be read as a diff."""
    def lines(value, indent=0):
        inside = " " * (indent + 1)
        if isinstance(value, dict) and any(isinstance(each, (list, dict)) and each for each in value.values()):
            inner = [f"{json.dumps(key)}: {lines(each, indent + 1)}" for key, each in value.items()]
            return "{\n" + ",\n".join(inside + each for each in inner) + f"\n{' ' * indent}}}"
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(inside + lines(each, indent + 1) for each in value) + f"\n{' ' * indent}]"
        return json.dumps(value, ensure_ascii=False)

    return lines(found) + "\n"


def main() -> None:
    names = sys.argv[1:] or list(CASES)
    RECORDED.mkdir(exist_ok=True)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            path_of(name).write_text(dump(observed(name, Path(folder).resolve())), encoding="utf-8")
        print(name)
    if names == list(CASES):
        (RECORDED / "KERNELS").write_text(kernels() + "\n")
        for stale in {*RECORDED.glob("*.json")} - {*map(path_of, CASES)}:
            stale.unlink()


if __name__ == "__main__":
    main()
