"""Type checkers of other people's projects know the types of looped: nothing lacks an
annotation, the lazily imported names are those that checkers read. `make types` asks pyright itself."""

import ast
import re
import sys
from pathlib import Path

import pytest

import looped

ROOT = Path(looped.__file__).parents[1]
BARE = {"dict", "list", "tuple", "set", "frozenset", "Callable", "Sequence", "Mapping", "Iterable", "Iterator"}


def test_checkers_read_the_names_that_are_imported_on_first_use():
    text = (ROOT / "looped" / "__init__.py").read_text()
    read = {name: module for module, name in re.findall(r"^    from ([\w.]+) import (\w+) as \2$", text, re.MULTILINE)}
    assert read == looped._PUBLIC


def gaps(source):
    """The public functions and methods of a module with a parameter, a result or the contents of a container untold."""
    found = []

    def visit(body):
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                visit(node.body)
            if isinstance(node, ast.FunctionDef) and (node.name.endswith("__") or not node.name.startswith("_")):
                given = node.args
                every = (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg)
                told = [each.annotation for each in every if each is not None and each.arg not in ("self", "cls")]
                told += [node.returns] if node.name != "__init__" else []
                if any(each is None or any(map(bare, parts(each))) for each in told):
                    found.append(node.name)

    visit(ast.parse(source).body)
    return found


def parts(annotation):
    """The annotation, and what its unions are of."""
    if isinstance(annotation, ast.BinOp):
        return [*parts(annotation.left), *parts(annotation.right)]
    return [annotation]


def bare(annotation):
    return isinstance(annotation, ast.Name) and annotation.id in BARE


def test_nothing_public_lacks_an_annotation():
    files = sorted((ROOT / "looped").rglob("*.py"))
    assert len(files) > 200
    assert {file.name: gaps(file.read_text()) for file in files if gaps(file.read_text())} == {}


@pytest.mark.parametrize("source", ["def f(x) -> int: ...", "def f(x: int): ...", "def f(x: dict) -> int: ...",
                                    "def f(*, x: list | None) -> int: ...", "def f(*x) -> int: ...",
                                    "class A:\n    def f(self, x): ..."])
def test_a_gap_would_be_found(source):
    assert gaps(source) == ["f"]
    assert gaps("def f(x: int, *rest: str) -> dict[str, int]: ...\ndef _g(x): ...") == []


def test_a_mistyped_public_name_is_an_error_to_checkers():
    """A `__getattr__` that they see would make every name right."""
    tree = ast.parse((ROOT / "looped" / "__init__.py").read_text())
    assert "__getattr__" not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert "__getattr__" in vars(sys.modules["looped"])


def test_checkers_see_that_settings_have_defaults():
    """They know a field's default by `default=` alone: Field(8) would make every setting a required argument."""
    calls = [call for path in (ROOT / "looped").rglob("*.py") for call in ast.walk(ast.parse(path.read_text("utf-8")))
             if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Field"]
    assert len(calls) > 150
    assert [ast.unparse(call) for call in calls if call.args] == []
