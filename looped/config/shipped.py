"""Configs and suites shipped with the package, by name: `smoke` is the installed smoke.yaml."""

import re
from importlib import resources
from pathlib import Path

from looped.errors import UserError, did_you_mean


def shipped(folder: str) -> dict[str, Path]:
    """Name -> path of the shipped YAML files of `configs` or `suites`."""
    root = resources.files(f"looped.{folder}")
    return {Path(entry.name).stem: Path(str(entry)) for entry in sorted(root.iterdir(), key=lambda entry: entry.name)
            if entry.name.endswith(".yaml")}


def config_path(name: str | Path) -> Path:
    """The path of a config, given by its path or by the name of a shipped one. Raises UserError."""
    path = Path(name)
    if path.is_file() or path.suffix or len(path.parts) != 1:
        return path
    known = shipped("configs")
    if path.name not in known:
        raise UserError(f"cannot read config {name}: there is no such file, and no shipped config has this name"
                        f"{did_you_mean(path.name, known)}; see looped configs")
    return known[path.name]


def summary(path: Path) -> str:
    """The first sentence of a file's opening comment."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line.strip() == "#":
            break
        words += line.lstrip("# ").split()
    text = " ".join(words)
    return re.split(r"(?<! al)\. ", text)[0].rstrip(".") + "." if text else ""
