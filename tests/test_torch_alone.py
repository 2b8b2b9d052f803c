"""The loop, masks, attention, solvers, schedules and noise work where torch is installed and nothing else of ours."""

import os
import re
import subprocess
import sys
from importlib.metadata import requires

import pytest
from pages import ROOT, blocks

NEEDS_MORE = ("from transformers", "from x_transformers", "build_objective", "looped.objectives")
"""Words of the snippets of docs/modules.md that need more than torch."""
SNIPPETS = [snippet for snippet in blocks(ROOT / "docs" / "modules.md", "python")
            if not any(word in snippet for word in NEEDS_MORE)]
START = """
import importlib.abc, sys
ALLOWED = {allowed!r} | set(sys.stdlib_module_names)

class Empty(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)

sys.meta_path.insert(0, Empty())
"""
EVERYTHING = """
import importlib, pkgutil, looped.nn
for module in pkgutil.iter_modules(looped.nn.__path__):
    importlib.import_module(f"looped.nn.{module.name}")
for name in ("samplers", "schedules", "noise", "edm", "clean_estimate", "sampling_params"):
    importlib.import_module(f"looped.diffusion.{name}")
"""


def needed_by(name):
    """The import names of a package and of all that it needs, as far as they are those of the packages."""
    found, left = set(), [name]
    while left:
        if (package := left.pop()) not in found:
            found.add(package)
            left += [re.match(r"[\w.-]+", line)[0] for line in requires(package) or () if ";" not in line]
    return {package.lower().replace("-", "_") for package in found}


def run(script):
    start = START.format(allowed=needed_by("torch") | {"looped", "torchgen", "functorch"})
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", start + script], capture_output=True, text=True,
                          env=environment)


@pytest.mark.parametrize("script", [EVERYTHING, *SNIPPETS], ids=lambda script: re.sub(r"\W+", " ", script)[-40:])
def test_it_runs(script):
    done = run(script)
    assert done.returncode == 0, done.stderr


def test_the_snippets_are_found():
    assert len(SNIPPETS) >= 4


@pytest.mark.parametrize("name", ["train", "Denoiser", "load_config"])
def test_a_public_name_that_needs_more_says_so(name):
    said = run(f"import looped; looped.{name}").stderr.strip().splitlines()[-1]
    assert re.match(rf"ModuleNotFoundError: looped.{name} needs \w+, which is not installed; install looped with its "
                    r"dependencies \(pip without --no-deps\)", said)


@pytest.mark.parametrize("words", [["train", "smoke"], ["eval", "run"]])
def test_the_command_line_without_its_packages_is_a_sentence(words):
    done = run(f"import sys; from looped.cli import main; sys.exit(main({words}))")
    assert done.returncode == 2
    assert re.fullmatch(r"looped: \w+ is not installed, which this command needs; install looped .*\n", done.stderr)


def test_what_needs_more_is_noticed():
    assert "No module named 'pydantic'" in run("import pydantic").stderr
    assert "No module named" in run("import looped.config").stderr
