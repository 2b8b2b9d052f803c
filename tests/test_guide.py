"""The guide's commands and snippets run, page by page, after those of its first page; its pages are those of the code."""

import re
import shutil

import pytest
import yaml
from pages import ROOT, SMALLER, blocks, commands, run_commands, run_snippet, small_configs

from looped.cli import VERBS
from looped.config import shipped

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

DOCS = ROOT / "docs"
HOME = DOCS / "index.md"
PAGES = [*(DOCS / f"{name}.md" for name in ("concepts", "denoising", "recipes")), *sorted(DOCS.glob("verbs/*.md"))]
SNIPPETS = [(page, number) for page in (HOME, *PAGES) for number in range(len(blocks(page, "python")))]

FEW = SMALLER["training"] | {"budget_unit": "steps"}
TEXT = {"model": SMALLER["model"], "training": FEW,
        "data": SMALLER["data"] | {"length": 64, "heldout": 0.1},
        "evaluation": SMALLER["evaluation"] | {"num_samples": 1, "depths": [1, 3]}}
TASK = {"model": {"width": 24}, "training": FEW | {"batch_size": 4},
        "evaluation": {"num_problems": 4, "depths": [1, 2]}}
SMALL = {"smoke": TEXT, "stdlib-denoise": TEXT, "stdlib-blocks": TEXT, "stdlib-blockwise": TEXT,
         "sudoku4-denoise": TASK}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder where the commands of the first page have been run, with small configs in the place of those that are
    shipped, and with some text."""
    folder = tmp_path_factory.mktemp("home")
    small_configs(folder, SMALL)
    (folder / "texts").mkdir()
    shutil.copy(DOCS / "depth.md", folder / "texts" / "notes.md")
    shutil.copy(DOCS / "interop.md", folder / "texts" / "new.txt")
    with pytest.MonkeyPatch.context() as patch:
        at_desk(patch, folder)
        assert run_commands(commands(HOME)) == 3
    return folder


def at_desk(patch, folder):
    """`looped train smoke` finds the small config."""
    shipped_as, small = shipped.shipped, {path.stem: path for path in (folder / "configs").glob("*.yaml")}
    patch.setattr(shipped, "shipped", lambda kind: small if kind == "configs" else shipped_as(kind))
    patch.chdir(folder)


@pytest.fixture
def desk(home, tmp_path, monkeypatch):
    """A copy of it for one page."""
    shutil.copytree(home, folder := tmp_path / "desk")
    at_desk(monkeypatch, folder)
    return folder


def test_the_first_page_leaves_a_run_and_its_pictures(home):
    assert (home / "runs" / "smoke" / "plots" / "depth.png").exists()


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, desk, in_place):
    with in_place():
        assert run_commands(commands(page)) >= 1


@pytest.mark.parametrize(("page", "number"), SNIPPETS, ids=lambda value: getattr(value, "stem", value))
def test_snippets_run(page, number, desk):
    run_snippet(blocks(page, "python")[number], f"{page.name} snippet {number}")


def test_a_verb_has_a_page_with_its_flags_and_an_example():
    assert {page.stem for page in DOCS.glob("verbs/*.md")} == set(VERBS)
    for verb in VERBS:
        page = DOCS / "verbs" / f"{verb}.md"
        assert page.read_text().count("<!-- flags -->") == 1
        assert any(line.startswith(f"looped {verb}") for line in commands(page))


def test_verbs_stand_in_the_navigation_in_the_order_of_the_help():
    listed = re.findall(r"verbs/([\w-]+)\.md", (ROOT / "mkdocs.yml").read_text())
    assert listed == list(VERBS)


def test_the_theme_fetches_nothing():
    theme = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["theme"]
    assert theme["font"] is False
