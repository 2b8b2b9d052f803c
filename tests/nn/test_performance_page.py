"""docs/performance.md: what it says of attention on a GPU, against the dispatchers and the metadata of the wheels."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from pages import ROOT

from looped.config.model import ModelConfig
from looped.nn.backends import BACKENDS
from looped.nn.xformers_build import Build, installed_build, misfit

PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
HEAD_DIMS = {"multiple of 8, at most 256": lambda dim: dim % 8 == 0 and dim <= 256,
             "multiple of 8, above 256": lambda dim: dim % 8 == 0 and dim > 256,
             "no multiple of 8": lambda dim: dim % 8 > 0,
             "multiple of 4": lambda dim: dim % 4 == 0,
             "no multiple of 4": lambda dim: dim % 4 > 0,
             "any": lambda dim: True}
needs_xformers = pytest.mark.skipif(installed_build() is None, reason="xformers is not installed")


def table(header):
    """The rows of the page's table with this first cell of its header, cell by cell."""
    lines = PAGE.split(f"| {header} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture(scope="module")
def asked():
    """`asked(way)`: what on_hopper.py finds with the library of xformers loaded or not."""
    found = {}
    for way in ("loaded", "unloaded"):
        done = subprocess.run([sys.executable, Path(__file__).parent / "on_hopper.py", way], capture_output=True,
                              text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
        assert done.returncode == 0, done.stderr
        found[way] = json.loads(done.stdout)
    return found


def cell(case):
    """The table's row of a case: the backend, xformers' operators without their versions, the context's kernel."""
    if case["backend"] == "xformers":
        return "xformers: " + ", ".join(re.sub(r"(@.*)?-pt$", "", name) for name in case["operators"])
    kernel = {"formula": "the formula"}.get(case["context"], f"the {case['context']} kernel")
    return case["backend"] + (f", context by {kernel}" if case["mask"] == "CleanNoisy" else "")


def fits(row, case):
    masks, dtypes, head_dim = row[:3]
    return (case["mask"] in masks.split(", ") and case["dtype"] in dtypes.split(", ")
            and HEAD_DIMS[head_dim](case["head_dim"]))


@needs_xformers
@pytest.mark.parametrize(("way", "column"), [("loaded", 3), ("unloaded", 4)])
def test_the_table_of_attention_is_what_the_dispatchers_choose(way, column, asked):
    rows, used = table("mask"), set()
    for case in asked[way]:
        (number, row), = [(i, row) for i, row in enumerate(rows) if fits(row, case)]  # exactly one
        said = row[column] if case["trains"] else re.sub(r", \w+B$", "", row[column])  # no backward operator
        assert cell(case) == said, case
        used.add(number)
    assert used == set(range(len(rows)))


@needs_xformers
def test_the_versions_of_the_page_are_the_installed_ones():
    """So that the table is looked at again when they change; ranges of versions may be installed."""
    torch, build = metadata.version("torch").partition("+")[0], installed_build()
    wanted = dict(re.findall(r"(torch|xformers)==(\S+)", (ROOT / "constraints.txt").read_text()))
    if (torch, build.version) != (wanted["torch"], wanted["xformers"]):
        pytest.skip("other versions than those of constraints.txt")
    assert f"with xformers {build.version} and torch {torch}." in PAGE
    assert build == Build("0.0.35", (12, 8))
    assert "torch>=2.10" in metadata.requires("xformers")


def test_the_notice_on_the_page_is_the_one_that_is_printed():
    said = misfit(Build("0.0.35", (12, 8)), "13.0", "")
    assert said in " ".join(PAGE.split())


def test_every_value_of_the_setting_has_a_row():
    values = [row[0].strip("`") for row in table("value")]
    assert sorted(values) == sorted(["auto", *BACKENDS])
    assert sorted(ModelConfig.model_fields["attention"].annotation.__args__) == sorted(values)
