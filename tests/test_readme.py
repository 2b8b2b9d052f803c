"""The README's commands and snippets run, in its order; its links and pictures exist; its table names every config."""

import re

import pytest
from pages import ROOT, SMALLER, blocks, broken_links, commands, run_commands, run_snippet, small_configs

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

README = ROOT / "README.md"
SNIPPETS = blocks(README, "python")
COMMANDS = commands(README)


@pytest.fixture(scope="module")
def desk(tmp_path_factory, in_place):
    """A folder with the configs in it, where the README's `looped` commands have been run one after another; the smoke
    config is smaller there than the one that is shipped, which has a test of its own."""
    folder = tmp_path_factory.mktemp("desk")
    small_configs(folder, {"smoke": SMALLER})
    with pytest.MonkeyPatch.context() as patch, in_place():
        patch.chdir(folder)
        run_commands(COMMANDS)
    return folder


def test_the_commands_run(desk):
    assert (desk / "runs" / "smoke" / "plots" / "depth.png").exists()
    assert sum(line.startswith("looped ") for line in COMMANDS) >= 5


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(number, desk, monkeypatch):
    monkeypatch.chdir(desk)
    run_snippet(SNIPPETS[number], f"README snippet {number}")


def test_the_snippets_are_found():
    assert len(SNIPPETS) >= 3


def test_make_targets_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    used = {line.split()[1] for line in COMMANDS if line.startswith("make ")}
    assert {"demo", "test"} <= used <= set(targets)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/experiments.md",
                                  "docs/inside-transformers.md"])
def test_links_lead_somewhere(page):
    assert broken_links(ROOT / page) == []


def test_every_config_is_in_the_table():
    listed = set(re.findall(r"\(configs/([\w-]+)\.yaml\)", README.read_text()))
    assert listed == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
