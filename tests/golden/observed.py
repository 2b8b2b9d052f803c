"""The record of a golden case: exit codes, messages, every row, text, picture and weight, and nothing of time.

    {"commands": [{command, exit, said, printed}], "files": {path: rows, digest or text}}

Floats are kept whole. Seconds, memory, paths, versions and dates are left out.
"""

import contextlib
import hashlib
import io
import json
import re
import shlex
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from looped.cli import main

TIMED = re.compile(r"second|^tokens/s$|peak|rss|created|^when$|^device$|^machine$|^python$|^torch$|^own$")
"""Keys and columns that differ from one run of a case to the next; `own` of a comparison is a share of seconds."""

ROWS = ("metrics.jsonl", "depth.jsonl", "samples.jsonl", "probes.jsonl", "compare.jsonl")


def observe(command_lines: list[str], folder: Path) -> dict:
    """Run the command lines in a folder, which is the current one, and gather what they leave there."""
    commands = [run(line) for line in command_lines]
    return {"commands": commands, "files": dict(sorted(left_behind(folder)))}


def run(line: str) -> dict:
    """One command line in this process."""
    printed, said = io.StringIO(), io.StringIO()

    def show(message, category, filename, lineno, file=None, line=None):
        """As Python shows a warning where nothing, as pytest does, gathers them."""
        said.write(warnings.formatwarning(message, category, filename, lineno, line))

    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module="looped")
        warnings.filterwarnings("ignore", message="this CPU has no instructions")  # other machines do not say it
        warnings.showwarning = show
        code = main(shlex.split(line))
    here = str(Path.cwd())
    said, printed = (stream.getvalue().replace(here, "DIR") for stream in (said, printed))
    return {"command": line, "exit": code, "said": said.splitlines(), "printed": timeless(printed)}


def timeless(text: str) -> list:
    """Printed lines without what tells of time: columns of tables, keys of JSON, figures of the log."""
    with contextlib.suppress(ValueError):
        return [untimed(json.loads(text))]
    lines, table = [], None
    for line in text.splitlines():
        line = line.rstrip()
        if not line.startswith("|"):
            table = None
            lines.append(untimed_line(line))
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if set(line) <= set("|-: "):
            continue
        table = table or [not TIMED.search(cell) for cell in cells]
        lines.append(" | ".join(cell for cell, kept in zip(cells, table, strict=True) if kept))
    return lines


def untimed_line(line: str) -> str | dict:
    """A line of the log, or of JSON."""
    with contextlib.suppress(ValueError):
        return untimed(json.loads(line))
    line = re.sub(r"  tokens_per_second [\d.,e+-]+", "", line)
    line = re.sub(r", [\d.,]+ s of training", "", line)
    line = re.sub(r"\d[\d.,]*", "N", line) if "second" in line else line
    line = re.sub(r" first measured later: no evaluation by then\.$", "", line)  # of arms at equal seconds, at times
    return re.sub(r"^started .*", "started", line)


def untimed(value):
    """A value of JSON without the keys that tell of time, and without rows that do; None for such a row."""
    if isinstance(value, dict):
        if any(TIMED.search(str(value.get(name, ""))) for name in ("metric", "budget")):
            return None
        return {name: untimed(each) for name, each in value.items() if not TIMED.search(name)}
    return [untimed(each) for each in value] if isinstance(value, list) else value


def left_behind(folder: Path):
    """(path, what is kept of it) of the files of runs and comparisons."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name in ROWS:
            rows = [untimed(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
            yield name, [row for row in rows if row is not None]
        elif path.name == "examples.jsonl":
            yield name, digest(json.dumps([json.loads(line) for line in path.read_text().splitlines()]).encode())
        elif path.name == "model.safetensors" and not path.parent.is_symlink():
            tensors = load_file(path)
            yield name, digest(*(part for key in sorted(tensors) for part in (key.encode(), bytes_of(tensors[key]))))
        elif path.suffix == ".png" and "plots" not in path.parts:
            yield name, digest(np.asarray(Image.open(path)).tobytes())
        elif path.name in ("compare.md", "depth.md", "sums.md"):
            text, *_ = path.read_text(encoding="utf-8").split("## Where it was measured")
            # samples, which any rounding may change, are left out
            yield name, timeless(re.sub(r"^(```+)\n.*?\n\1$", r"\1", text, flags=re.MULTILINE | re.DOTALL))


def bytes_of(tensor: torch.Tensor) -> bytes:
    return str((tensor.dtype, tuple(tensor.shape))).encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return f"sha256 {found.hexdigest()[:24]}"


def kernels() -> str:
    """A digest of what this processor and this torch compute: equal digests stand for figures equal to the last bit."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(33, 33, generator=generator) for _ in range(2))
    found = [x @ y, x.exp(), x.softmax(-1), torch.nn.functional.silu(x), x.sum(0), x.double() @ y.double(),
             (x.bfloat16() @ y.bfloat16()).float(), x.square().mean(-1).rsqrt(),
             torch.nn.functional.scaled_dot_product_attention(x[None, None], y[None, None], x[None, None])]
    return digest(torch.__version__.encode(), *(bytes_of(each) for each in found))
