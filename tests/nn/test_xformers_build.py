"""An xformers that does not fit is found by its wheel or at its import, and said with the line that mends it."""

import json
import os
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from looped.nn import backends
from looped.nn.xformers_build import Build, installed_build, misfit, read_build, unloaded

needs_xformers = pytest.mark.skipif(installed_build() is None, reason="xformers is not installed")
AT_13 = ("pip install --force-reinstall --no-deps xformers==0.0.35 --index-url "
         "https://download.pytorch.org/whl/cu130")


@pytest.mark.parametrize(("cuda", "torch_cuda", "error", "said"), [
    ((12, 8), "13.0", "", f"xformers 0.0.35 is built for CUDA 12.8 and torch brings CUDA 13.0, so none of its kernels "
                          f"loads; {AT_13}"),
    (None, "13.0", "", f"xformers 0.0.35 was installed without its CUDA library; {AT_13}"),
    ((13, 0), "13.0", "no symbol", f"the library of xformers 0.0.35 does not load (no symbol); {AT_13}"),
    ((13, 2), "13.0", "", f"the library of xformers 0.0.35 does not load (no reason given); {AT_13}")])
def test_what_does_not_fit_is_one_sentence_with_the_line_that_mends_it(cuda, torch_cuda, error, said):
    assert misfit(Build("0.0.35", cuda), torch_cuda, error) == said


@pytest.mark.parametrize(("content", "cuda"), [
    (json.dumps({"version": {"cuda": 1208}}), (12, 8)), (json.dumps({"version": {"cuda": 1300}}), (13, 0)),
    (json.dumps({"version": {"cuda": None}}), None), ("{}", None), ("no json", None), (None, None)])
def test_the_cuda_of_a_build_is_read_from_its_wheel(content, cuda, tmp_path):
    if content is not None:
        (tmp_path / "cpp_lib.json").write_text(content)
    assert read_build("1.2", tmp_path) == Build("1.2", cuda)


@needs_xformers
def test_the_installed_wheel_is_read_without_importing_it():
    code = ("import sys; from looped.nn.xformers_build import installed_build; print(installed_build().version); "
            "sys.exit('xformers' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == metadata.version("xformers")
    assert installed_build().cuda is not None


@needs_xformers
def test_a_library_that_loads_or_a_torch_without_cuda_is_no_misfit(monkeypatch):
    loaded, lost = (SimpleNamespace(common=SimpleNamespace(_built_with_cuda=built)) for built in (True, False))
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    assert unloaded(loaded) == ""
    assert "torch brings CUDA 99.0" in unloaded(lost)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert unloaded(lost) == ""


@needs_xformers
def test_what_the_loader_said_is_passed_on(monkeypatch):
    from xformers import _cpp_lib

    outer = ImportError("xformers' own account, of many lines")
    outer.__cause__ = OSError("libcudart.so.12: cannot open shared object file\nand more")
    monkeypatch.setattr(_cpp_lib, "_cpp_library_load_exception", outer)
    monkeypatch.setattr(torch.version, "cuda", f"{installed_build().cuda[0]}.0")
    said = unloaded(SimpleNamespace(common=SimpleNamespace(_built_with_cuda=False)))
    assert "does not load (libcudart.so.12: cannot open shared object file);" in said


IMPORT = """
import torch
from looped.nn.attention import choose_backend
from looped.nn.backends import reason_not, xformers_ops
from looped.nn.masks import Causal
print(reason_not("xformers", Causal(), "cuda", torch.bfloat16))
print(choose_backend("auto", Causal(), "cuda", torch.bfloat16), xformers_ops())
"""


@needs_xformers
def test_an_xformers_whose_import_fails_is_a_reason_and_no_error(tmp_path):
    """xformers refuses versions of flash_attn that it does not know; here it finds one."""
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '99.0'\n")
    (package / "flash_attn_interface.py").write_text("flash_attn_gpu = None\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr
    reason, chosen = done.stdout.splitlines()
    assert reason.startswith("xformers cannot be imported (ImportError: Requires Flash-Attention version >=")
    assert reason.endswith("mend or remove that package")
    assert chosen == "sdpa None"
    assert done.stderr.count("attention runs without xformers") == 1


def test_any_failure_at_import_is_a_reason(monkeypatch):
    monkeypatch.setattr(backends, "_loaded", lambda: (None, "xformers cannot be imported (KeyError: 'x')"))
    assert backends.reason_not("xformers", backends.Causal(), "cuda", torch.bfloat16).startswith("xformers cannot be")
