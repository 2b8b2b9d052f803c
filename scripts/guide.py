"""MkDocs hook (see mkdocs.yml) that generates pages of the guide from the code.

    settings.md       every setting, section by section        looped.config
    verbs/VERB.md     the flags of a verb, where its page says <!-- flags -->    docstrings of looped/cli
    api/PACKAGE.md    every public module of a package         docstrings, by mkdocstrings and guide_docstrings.py
    source/...        files of the repository that a page links to

Code is parsed, not run, except for `looped.config` and the lists of names in `looped` and `looped.cli`, which need no
torch. Equations become MathML, which browsers render without scripts.
"""

import html
import re
import sys
from collections.abc import Iterator
from functools import cache
from keyword import iskeyword
from pathlib import Path
from posixpath import normpath, relpath

import griffe
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import looped  # noqa: E402
from looped.cli import VERBS  # noqa: E402
from looped.config import Config, describe_settings  # noqa: E402

PACKAGES = ("nn", "diffusion", "models", "objectives", "inference", "evaluation", "training", "hub")
FLAGS = "<!-- flags -->"
LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)(?=\))")
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
REMOTE = re.compile(r'<(?:script|link|img|iframe|source|object)\b[^>]*?(?:src|href|data)="((?:https?:)?//[^"]+)"')
PAGE = re.compile(r"\bdocs/([\w-]+)\.md\b")
NAME = re.compile(r"(?<![\w`.])looped\.((?:\w|\\_)+)")
OUTPUT = re.compile(r'<div class="(language-text highlight)">(.*?)</div>', re.DOTALL)
ROW = re.compile(r"^(?:<[^>]*>)*\|", re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".md": "markdown"}


def on_files(files: Files, config) -> Files:
    """The pages of docs/, plus the generated ones."""
    pages = {"settings.md": settings_page(), "api/looped.md": names_page()}
    pages |= {f"api/{package}.md": package_page(package) for package in PACKAGES}
    for path in linked(files):
        pages |= dict(source_pages(path))
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """The page with the flags of its verb, and with links out of docs/ to the pages of their files."""
    here = page.file.src_uri
    if FLAGS in markdown:
        markdown = markdown.replace(FLAGS, verb_reference(Path(here).stem))
    elif here.startswith("verbs/"):
        raise PluginError(f"{here} has no {FLAGS}, where its flags belong")
    return LINK.sub(lambda link: source_link(link[1], here), markdown)


def on_page_content(content: str, page, config, files: Files) -> str:
    """The page with its equations as MathML, and with its printed tables marked, whose lines must not be wrapped."""
    content = OUTPUT.sub(lambda found: printed(*found.groups()), content)
    return MATH.sub(lambda found: equation(found[2], display="block" if found[1] == "div" else "inline"), content)


def printed(kind: str, lines: str) -> str:
    """A block of output; `columns` is among its classes if it has a table."""
    columns = " columns" if ROW.search(lines) else ""
    return f'<div class="{kind}{columns}">{lines}</div>'


def equation(latex: str, display: str) -> str:
    """LaTeX as MathML. A lone subscript gets an empty superscript: without a mathematical font Chromium lowers a
    subscript too little on its own, but enough with a superscript."""
    drawn = convert(html.unescape(latex), display=display)
    return drawn.replace("<msub>", "<msubsup>").replace("</msub>", "<mrow></mrow></msubsup>")


@cache
def read_package() -> griffe.Object:
    """The source of `looped`, parsed and not run."""
    return griffe.load("looped", search_paths=[ROOT])


def on_post_build(config) -> None:
    """Check that every page works without a network. Raises PluginError for one that does not."""
    for page in Path(config.site_dir).rglob("*.html"):
        if remote := remote_assets(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page} loads {remote[0]} from the network")


def remote_assets(page: str) -> list[str]:
    """The addresses of scripts, styles, fonts and pictures that a page would fetch from elsewhere."""
    return REMOTE.findall(page)


# Settings

def settings_page() -> str:
    """Every setting with its default, in one table per section."""
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for name, default, description in describe_settings():
        sections.setdefault(name.rpartition(".")[0], []).append((name, default, description))
    parts = ["# Settings", "Each setting is a flag, `--model.width 256`, and a key of the YAML file, `model: {width: "
             "256}`. Flags override the file, the file the defaults. `looped settings SECTION` prints the same."]
    for section, rows in sections.items():
        parts += [f"## {section or 'Top level'}", section_summary(section)]
        parts.append(table(("setting", "default", "meaning"), [
            (f"`{name}`{{ #{name} }}", code(default), text(description)) for name, default, description in rows]))
    return "\n\n".join(filter(None, parts))


def section_summary(section: str) -> str:
    """The docstring of a section's class."""
    found: object = Config()
    for part in filter(None, section.split(".")):
        found = getattr(found, part)
    return " ".join((type(found).__doc__ or "").split())


# Verbs

def verb_reference(verb: str) -> str:
    """Docstring, usage and flags of a verb."""
    if verb not in VERBS:
        raise PluginError(f"verbs/{verb}.md belongs to no verb of looped.cli")
    made = read_package()[f"cli.{verb}{'_' * iskeyword(verb)}.{verb.capitalize()}"]
    fields = [each for each in made.attributes.values() if each.annotation is not None]
    positional = [each for each in fields if str(each.annotation).startswith("Positional")]
    usage = " ".join(["looped", verb, *(argument(each) for each in positional), "[FLAGS]"])
    parts = [with_links(plain(made.docstring.value)), f"```text\n{usage}\n```"]
    if fields:
        parts.append(table(("argument", "default", "meaning"), [row_of(each) for each in fields]))
    return "\n\n".join(parts)


def with_links(prose: str) -> str:
    """Prose of a verb's page with links to the pages and public names that it mentions."""
    named = NAME.sub(lambda found: _named(found[1].replace("\\", "")) or found[0], prose)
    return PAGE.sub(r"[docs/\1.md](../\1.md)", named)


def _named(name: str) -> str:
    return f"[`looped.{name}`][{looped._PUBLIC[name]}.{name}]" if name in looped._PUBLIC else ""


def argument(field: griffe.Attribute) -> str:
    """A positional argument, as usage lines write it."""
    name = field.name.upper()
    if "tuple" in str(field.annotation):
        return f"{name.removesuffix('S')} ..."
    return name if field.value is None else f"[{name}]"


def row_of(field: griffe.Attribute) -> tuple[str, str, str]:
    positional = str(field.annotation).startswith("Positional")
    name = field.name.upper() if positional else f"--{field.name.replace('_', '-')}"
    if field.docstring is None:
        raise PluginError(f"{field.path} has no docstring")
    if field.value is None:
        default = "required"
    else:
        default = "" if str(field.value) in ("None", "False", "()") else code(str(field.value).strip("'"))
    return f"`{name}`", default, text(field.docstring.value)


# API

def names_page() -> str:
    """The public names of `looped`, with links to their descriptions."""
    parts = ["# looped", "The public names of `looped`; each is imported on first use."]
    names = [f"{module}.{name}" for name, module in looped._PUBLIC.items()]
    parts.append(table(("name", "from", "purpose"), [
        (f"[`{path.rpartition('.')[2]}`][{path}]", f"`{path.rpartition('.')[0]}`", first_sentence(path))
        for path in names]))
    return "\n\n".join([*parts, *(f"::: {path}" for path in names if path.split(".")[1] not in PACKAGES)])


def package_page(package: str) -> str:
    """Every public module of a package."""
    folder, parts = ROOT / "looped" / package, [f"# looped.{package}"]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(folder.rglob("*.py"))
               if not path.stem.startswith("_")]
    parts.append(table(("module", "contents"), [
        (f"[`{module.removeprefix(f'looped.{package}.')}`][{module}]", first_sentence(module)) for module in modules]))
    if own := own_names(f"looped.{package}"):
        parts.append(f"::: looped.{package}\n    options: {{members: {own}}}")
    return "\n\n".join([*parts, *(f"::: {module}" for module in modules)])


def first_sentence(path: str) -> str:
    """The first sentence of the docstring at a dotted path, for a table cell."""
    docstring = read_package()[path.removeprefix("looped.")].docstring
    if docstring is None:
        raise PluginError(f"{path} has no docstring")
    return text(re.split(r"(?<=\.)\s+(?=[A-Z`]|[a-z]\w*(?:, \w+)*: )|\n\n", docstring.value)[0].rstrip(":"))


def own_names(package: str) -> list[str]:
    """Public names that a package itself defines."""
    members = read_package()[package.removeprefix("looped.")].members.values()
    return [each.name for each in members if not each.is_alias and each.is_function and not each.name.startswith("_")]


# Files of the repository

def linked(files: Files) -> Iterator[Path]:
    """Files and folders outside docs/ that pages link to."""
    for file in files.documentation_pages():
        for link in LINK.findall(file.content_string):
            path = normpath(f"docs/{file.src_uri}/../{link}")
            if not path.startswith("docs/"):
                yield Path(path)


def source_pages(path: Path) -> Iterator[tuple[str, str]]:
    """(address, text) of the page of a file, or of a folder and its files."""
    full = ROOT / path
    if full.is_dir():
        inside = [path / each.name for each in sorted(full.iterdir()) if each.suffix in LANGUAGES]
        yield f"source/{path}/index.md", "\n".join([f"# {path}", "", *(f"- [{each.name}]({each.name}.md)"
                                                                        for each in inside)])
        for each in inside:
            yield from source_pages(each)
    elif full.is_file():
        text = full.read_text(encoding="utf-8")
        yield f"source/{path}.md", f"# {path}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n````\n"
    else:
        raise PluginError(f"a page links to {path}, which is not there")


def source_link(link: str, here: str) -> str:
    """A link out of docs/, turned into a link to the page of that file."""
    path = normpath(f"docs/{here}/../{link}")
    if path.startswith("docs/"):
        return link
    page = f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"
    return relpath(page, Path(here).parent.as_posix())


# Markdown

def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table of class `reference`, for the guide's style sheet, and `defaults` if it has a column of them."""
    lines = [head, tuple("---" for _ in head), *rows]
    kind = "reference defaults" if "default" in head else "reference"
    return "\n".join([f"<div class=\"{kind}\" markdown>", "", *(f"| {' | '.join(line)} |" for line in lines), "",
                      "</div>"])


def code(value: str) -> str:
    return f"`{value}`".replace("|", "\\|") if value.strip() else ""


def text(prose: str) -> str:
    """Prose for a table cell: one line, with Markdown's special characters escaped."""
    return plain(" ".join(prose.split()))


def plain(prose: str) -> str:
    """Prose of a docstring, with Markdown's special characters escaped outside of backticks."""
    parts = prose.split("`")
    parts[::2] = [re.sub(r"([*_{}\[\]$])", r"\\\1", part.replace("<", "&lt;").replace("|", "&#124;"))
                  for part in parts[::2]]
    return "`".join(parts)
