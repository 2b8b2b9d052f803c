"""Scripts as modules, as Python has them when they are run: with their own folder to import from."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "scripts/reproduce"


@pytest.fixture
def load(monkeypatch):
    """`load(name)`: the script of that name, anew for every test."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def go(name):
        for module in (name, "comparison"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        return importlib.import_module(name)

    return go
