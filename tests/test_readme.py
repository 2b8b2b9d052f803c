"""The README's commands and snippets run, in its order; its links and pictures exist; its table names every config."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from looped.cli import main

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL) for line in block.splitlines()]

SMALLER = {"model": {"width": 16}, "data": {"max_bytes": 200_000, "vocab_size": 300, "length": 128},
           "training": {"budget": 6, "num_evals": 3}, "evaluation": {"num_sequences": 4, "sample_length": 4}}


@pytest.fixture(scope="module")
def desk(tmp_path_factory, in_place):
    """A folder with the configs in it, where the README's `looped` commands have been run one after another; the smoke
    config is smaller there than the one that is shipped, which has a test of its own."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(ROOT / "configs", folder / "configs")
    smoke = yaml.safe_load((folder / "configs" / "smoke.yaml").read_text())
    for section, values in SMALLER.items():
        smoke[section] |= values
    (folder / "configs" / "smoke.yaml").write_text(yaml.safe_dump(smoke))
    with pytest.MonkeyPatch.context() as patch, in_place():
        patch.chdir(folder)
        for line in COMMANDS:
            program, *arguments = shlex.split(line, comments=True)
            if program == "looped":
                assert main(arguments) == 0, line
    return folder


def test_the_commands_run(desk):
    assert (desk / "runs" / "smoke" / "plots" / "depth.png").exists()
    assert sum(line.startswith("looped ") for line in COMMANDS) >= 5


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(number, desk, monkeypatch):
    monkeypatch.chdir(desk)
    exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), {})


def test_the_snippets_are_found():
    assert len(SNIPPETS) >= 3


def test_make_targets_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    used = {line.split()[1] for line in COMMANDS if line.startswith("make ")}
    assert {"demo", "test"} <= used <= set(targets)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/experiments.md",
                                  "docs/inside-transformers.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    assert [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()] == []


def test_every_config_is_in_the_table():
    listed = set(re.findall(r"\(configs/([\w-]+)\.yaml\)", TEXT))
    assert listed == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
