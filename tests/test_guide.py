"""The guide's commands and snippets run, page by page, after those of its first page; every verb has a page."""

import re
import shutil
from dataclasses import fields
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from pages import ROOT, SMALLER, at_desk, blocks, commands, files, run_commands, run_snippet, small_configs

import looped
from looped.cli import VERBS, verb_class
from looped.config import describe_settings

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

DOCS = ROOT / "docs"
HOME = DOCS / "index.md"
OWN_TASKS = DOCS / "own-tasks.md"
PAGES = [*(DOCS / f"{name}.md" for name in ("concepts", "denoising", "recipes", "modules", "trainer", "beyond",
                                            "own-tasks", "extending")),
         *sorted(DOCS.glob("verbs/*.md"))]
SNIPPETS = [(page, number) for page in (HOME, *PAGES) for number in range(len(blocks(page, "python")))]

FEW = {"budget": 3, "budget_unit": "steps", "num_evals": 1}
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
    shipped, some text, the files of the pages, and the first task of the page on tasks with its run."""
    folder = tmp_path_factory.mktemp("home")
    small_configs(folder, SMALL)
    (folder / "texts").mkdir()
    shutil.copy(DOCS / "depth.md", folder / "texts" / "notes.md")
    shutil.copy(DOCS / "interop.md", folder / "texts" / "new.txt")
    with pytest.MonkeyPatch.context() as patch:
        at_desk(patch, folder)
        assert run_commands(commands(HOME)) == 3
        for name, content in (files(OWN_TASKS) | files(DOCS / "extending.md")).items():
            (folder / name).write_text(content)
        assert run_commands(commands(OWN_TASKS)[:2]) == 2
    return folder


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


def test_every_page_stands_in_the_navigation():
    listed = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f": {page.name}\n" not in listed] == []


def test_the_build_counts_warnings():
    """Under --quiet MkDocs sees none, so --strict would refuse nothing."""
    build, = re.findall(r"mkdocs build.*", (ROOT / "Makefile").read_text())
    assert "--strict" in build
    assert "--quiet" not in build


def of_scripts(name):
    """A module of scripts/."""
    found = spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    found.loader.exec_module(module := module_from_spec(found))
    return module


@pytest.fixture(scope="module")
def hook():
    """scripts/guide.py, which MkDocs runs."""
    pytest.importorskip("mkdocs", reason="the guide is built with the extra docs")
    return of_scripts("guide")


@pytest.fixture(scope="module")
def docstrings():
    """scripts/guide_docstrings.py, which mkdocstrings runs."""
    pytest.importorskip("griffe", reason="the guide is built with the extra docs")
    return of_scripts("guide_docstrings")


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_of_a_verb_is_described(verb, hook):
    listed = set(re.findall(r"^\| `(?:--)?([\w-]+)` \|", hook.verb_reference(verb), flags=re.MULTILINE))
    assert {name.lower().replace("-", "_") for name in listed} == {field.name for field in fields(verb_class(verb))}


def test_every_setting_is_described(hook):
    page = hook.settings_page()
    assert [name for name, *_ in describe_settings() if f"`{name}`{{ #{name} }}" not in page] == []


def test_every_public_name_leads_to_its_description(hook):
    page = hook.names_page()
    assert [name for name in looped._PUBLIC if f".{name}" not in page] == []


def test_signs_of_a_docstring_mean_themselves(hook):
    assert hook.plain("plots/*.png and eval/*.jsonl of `a_b`") == r"plots/\*.png and eval/\*.jsonl of `a_b`"
    assert hook.plain("runs/<name>, a | b") == "runs/&lt;name>, a &#124; b"
    assert hook.plain("print lines {prompt, depth}") == r"print lines \{prompt, depth\}"  # attributes, else


def test_a_page_that_fetches_something_is_noticed(hook):
    assert hook.remote_assets('<a href="https://arxiv.org">paper</a> <img src="demo.png">') == []
    assert hook.remote_assets('<script async src="https://unpkg.com/x.js"></script>') == ["https://unpkg.com/x.js"]
    assert hook.remote_assets('<link rel="stylesheet" href="//fonts/a.css">') == ["//fonts/a.css"]


def test_an_equation_is_drawn_without_a_script(hook):
    drawn = hook.on_page_content(r'<span class="arithmatex">\(\sigma_t &lt; 1\)</span>', None, None, None)
    assert drawn.startswith("<math")
    assert "&#x0003C;" in drawn
    assert "arithmatex" not in drawn


def test_a_public_name_is_described_in_one_sentence(hook):
    rows = re.findall(r"^\| \[`(\w+)`\]\S+ \| `\S+` \| (.*) \|$", hook.names_page(), flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(looped._PUBLIC)
    assert dict(rows)["Causal"] == "Row i attends to rows up to i."
    assert [name for name, purpose in rows if not purpose] == []


def test_a_verb_links_to_pages_and_names(hook):
    linked = hook.with_links(hook.plain("docs/figures.md; looped.read_results"))
    assert linked == ("[docs/figures.md](../figures.md); "
                      "[`looped.read_results`][looped.evaluation.dataframes.read_results]")
    assert hook.with_links("looped.nothing") == "looped.nothing"


def test_lines_of_output_are_wrapped_unless_they_are_a_table(hook):
    block = '<div class="language-text highlight"><pre><span></span><code>%s</code></pre></div>'
    table, prose = block % "two\n| run | depth |", block % "a | b"
    assert 'class="language-text highlight columns"' in hook.on_page_content(table, None, None, None)
    assert hook.on_page_content(prose, None, None, None) == prose


def test_described_arguments_become_items(docstrings):
    names = ["mean", "backprop"]
    said = docstrings.for_page("Depths. mean: of the loop.\nbackprop: None: all. Raises UserError.", names)
    assert said == "Depths.\n\n- `mean`: of the loop.\n- `backprop`: None: all.\n\nRaises UserError."
    shaped = docstrings.for_page("`mean` (B,): of each; backprop (B, L): all.", names)
    assert shaped == "- `mean` (B,): of each\n- `backprop` (B, L): all."
    assert docstrings.for_page("One. mean: of the loop.", ["mean"]) == "One. mean: of the loop."
    assert docstrings.for_page("Of both. a: b: c.", ["mean"]) == "Of both. a: b: c."


def test_indented_lines_of_a_docstring_become_code(docstrings):
    said = docstrings.for_page("Use:\n\n    x = 1\n\n    y = 2\n\nOr:\n\n    loop   depth steps", [])
    assert said == "Use:\n\n```python\nx = 1\n\ny = 2\n```\n\nOr:\n\n```text\nloop   depth steps\n```"
