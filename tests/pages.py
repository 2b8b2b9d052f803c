"""Pages whose commands and snippets are run: what stands in them, and a folder with configs small enough for a test."""

import re
import shlex
import shutil
from pathlib import Path

import yaml

from looped.cli import main
from looped.config import shipped

ROOT = Path(__file__).parents[1]
SMALLER = {"model": {"width": 16}, "data": {"max_bytes": 200_000, "vocab_size": 300, "length": 128},
           "training": {"budget": 6, "num_evals": 3}, "evaluation": {"num_sequences": 4, "sample_length": 4}}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def files(page: Path) -> dict[str, str]:
    """The complete files of a page, each after a paragraph that ends in its name: name -> content."""
    return dict(re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL))


def commands(page: Path) -> list[str]:
    """The lines of the page's shell blocks, continued ones as one."""
    return [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead to no file."""
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    return [link for link in links if "://" not in link and not page.parent.joinpath(link).exists()]


def small_configs(folder: Path, smaller: dict[str, dict]) -> None:
    """The configs that are shipped, in `folder`/configs; of each name the sections given are changed."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name, sections in smaller.items():
        path = folder / "configs" / f"{name}.yaml"
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        for section, values in sections.items():
            config[section] = config.get(section, {}) | values
        path.write_text(yaml.safe_dump(config), encoding="utf-8")


def at_desk(patch, folder: Path) -> None:
    """Work in a folder of `small_configs`: `looped train smoke` finds the small config."""
    shipped_as, small = shipped.shipped, {path.stem: path for path in (folder / "configs").glob("*.yaml")}
    patch.setattr(shipped, "shipped", lambda kind: small if kind == "configs" else shipped_as(kind))
    patch.chdir(folder)


def run_commands(lines: list[str]) -> int:
    """The number of `looped` commands among the lines, all of which have been run in this process."""
    calls = [words[1:] for line in lines if (words := shlex.split(line, comments=True))[:1] == ["looped"]]
    for arguments in calls:
        assert main(arguments) == 0, arguments
    return len(calls)


def run_snippet(snippet: str, name: str) -> None:
    exec(compile(snippet, name, "exec"), {})
