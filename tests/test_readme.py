"""The README's commands and snippets run, in its order; links and pictures exist; its table is that of the guide."""

import re
import shutil

import pytest
from pages import ROOT, SMALLER, at_desk, blocks, broken_links, commands, run_commands, run_snippet, small_configs

from looped.config.rules import RULES

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
    (folder / "docs").mkdir()
    for page in sorted((ROOT / "docs").glob("*.md"))[:4]:
        shutil.copy(page, folder / "docs")
    with pytest.MonkeyPatch.context() as patch, in_place():
        at_desk(patch, folder)
        run_commands(COMMANDS)
    return folder


def test_the_commands_run(desk):
    assert (desk / "runs" / "smoke" / "plots" / "depth.png").exists()
    assert sum(line.startswith("looped ") for line in COMMANDS) >= 5


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(number, desk, monkeypatch):
    at_desk(monkeypatch, desk)
    run_snippet(SNIPPETS[number], f"README snippet {number}")


def test_the_snippets_are_found():
    assert len(SNIPPETS) >= 2


def test_make_targets_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    used = {line.split()[1] for line in COMMANDS if line.startswith("make ")}
    assert {"demo", "test"} <= used <= set(targets)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/experiments.md",
                                  "docs/inside-transformers.md"])
def test_links_lead_somewhere(page):
    assert broken_links(ROOT / page) == []


def test_the_rules_cost_what_the_guide_says():
    """Rule -> (layer forwards, MB kept for backward), in the README's table and in that of docs/concepts.md."""
    ours = re.findall(r"^\| `([\w-]+)` \|[^|]*\| ([\d.]+) \| (\d+) \|", README.read_text(), flags=re.MULTILINE)
    theirs = re.findall(r"^\| `([\w-]+)[^|]*` \| ([\d.]+) \| (\d+) \|$", (ROOT / "docs" / "concepts.md").read_text(),
                        flags=re.MULTILINE)
    assert len(ours) == 9
    assert sorted(ours) == sorted(theirs)


def test_every_rule_is_named():
    assert [name for name in RULES if f"`{name}`" not in README.read_text()] == []


def test_it_is_short():
    assert len(README.read_text().splitlines()) <= 140
