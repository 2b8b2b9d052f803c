"""Compatibility of the installed xformers and torch, and the message if they do not match.

Its compiled library is linked against the CUDA runtime of one major version (`libcudart.so.12`), and torch brings the
runtime of one. If the two differ, the library does not load, and xformers then calls every operator unsupported, those
that only call torch's own kernels too.
"""

import importlib.util
import json
import logging
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

INDEX = "https://download.pytorch.org/whl"
"""Wheels of torch and xformers by CUDA version: the folder of CUDA 13.0 is `cu130`."""


@dataclass(frozen=True)
class Build:
    """The CUDA version of an xformers build: `cuda` (12, 8), or None for a build without CUDA."""

    version: str
    cuda: tuple[int, int] | None


def installed_build() -> Build | None:
    """The build of the installed xformers, from the wheel's own `cpp_lib.json` and without importing it; None if it is
    not installed."""
    spec = importlib.util.find_spec("xformers")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        version = metadata.version("xformers")
    except metadata.PackageNotFoundError:
        version = "of unknown version"
    return read_build(version, Path(spec.submodule_search_locations[0]))


def read_build(version: str, folder: Path) -> Build:
    """The build of the xformers in a folder; without CUDA where the file is missing or says nothing of it."""
    try:
        number = json.loads((folder / "cpp_lib.json").read_text(encoding="utf-8"))["version"]["cuda"]
        return Build(version, divmod(int(number), 100))  # 1208: CUDA 12.8
    except (OSError, ValueError, KeyError, TypeError):
        return Build(version, None)


def misfit(build: Build, torch_cuda: str, error: str) -> str:
    """Reason that `build` cannot be loaded with torch for CUDA `torch_cuda` ("13.0"), and the command that fixes it.
    error: the loader's message."""
    if build.cuda is None:
        return f"xformers {build.version} was installed without its CUDA library; {_line(build, torch_cuda)}"
    if build.cuda[0] == int(torch_cuda.partition(".")[0]):
        return (f"the library of xformers {build.version} does not load ({error or 'no reason given'}); "
                f"{_line(build, torch_cuda)}")
    return (f"xformers {build.version} is built for CUDA {build.cuda[0]}.{build.cuda[1]} and torch brings CUDA "
            f"{torch_cuda}, so none of its kernels loads; {_line(build, torch_cuda)}")


def _line(build: Build, torch_cuda: str) -> str:
    """The command that installs the same xformers for torch's CUDA. No dependencies, or pip might replace torch."""
    exact = f"=={build.version}" if build.version[:1].isdigit() else ""
    return (f"pip install --force-reinstall --no-deps xformers{exact} --index-url "
            f"{INDEX}/cu{torch_cuda.replace('.', '')}")


def load_fmha() -> tuple[Any, str]:
    """(the module `xformers.ops.fmha`, ""), or (None, why it cannot be imported).

    Its notice about builds is silenced, since `unloaded` says it. Any exception counts: beside a flash_attn of another
    version the import itself fails.
    """
    if importlib.util.find_spec("xformers") is None:
        return None, "xformers is not installed; pip install xformers"
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from xformers.ops import fmha
    except Exception as error:
        said = " ".join(str(error).split())
        return None, f"xformers cannot be imported ({type(error).__name__}: {said}); mend or remove that package"
    finally:
        logger.setLevel(level)
    return fmha, ""


def unloaded(fmha: Any) -> str:
    """Reason that xformers has no CUDA kernels, as by `misfit`; empty if its library is loaded or torch has no CUDA."""
    if fmha.common._built_with_cuda or torch.version.cuda is None:
        return ""
    from xformers import _cpp_lib

    error = getattr(_cpp_lib, "_cpp_library_load_exception", None)
    while getattr(error, "__cause__", None) is not None:  # the first of the chain is the loader's own
        error = error.__cause__
    said = str(error or "").partition("\n")[0]
    return misfit(installed_build() or Build("of unknown version", None), torch.version.cuda, said)
