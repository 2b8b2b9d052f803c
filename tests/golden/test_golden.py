"""Tiny runs of every kind of data under every rule give what they gave when they were recorded (record.py).

On other kernels than those of the recording (another processor, another torch) rounding differs: figures are then held
to a part in a thousand, and digests and texts, which any rounding may change, are left out, with a line that says so.
"""

import json
import math
import re

import pytest
from cases import CASES
from observed import kernels
from record import RECORDED, observed, path_of

SAME_KERNELS = (RECORDED / "KERNELS").read_text().strip() == kernels()

pytestmark = pytest.mark.golden


def differences(ours, theirs, where=""):
    """The places in which two observations differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in ours | theirs:
            if name not in ours or name not in theirs:
                yield f"{where}/{name} is {'gone' if name not in ours else 'new'}"
            else:
                yield from differences(ours[name], theirs[name], f"{where}/{name}")
    elif isinstance(theirs, list) and isinstance(ours, list):
        if len(ours) != len(theirs):
            yield f"{where} has {len(ours)} lines, and {len(theirs)} are recorded"
        for number, pair in enumerate(zip(ours, theirs, strict=False)):
            yield from differences(*pair, f"{where}[{number}]")
    elif not alike(ours, theirs):
        yield f"{where} is {ours!r}, recorded {theirs!r}"


def alike(ours, theirs) -> bool:
    """True where two values are the same: to the last bit on the kernels of the recording."""
    if ours == theirs or (ours != ours and theirs != theirs):
        return True
    if SAME_KERNELS:
        return False
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-3, abs_tol=1e-3)
    return isinstance(ours, str) and isinstance(theirs, str) and (
        theirs.startswith("sha256 ") or without_numbers(ours) == without_numbers(theirs))


def without_numbers(text: str) -> str:
    return re.sub(r"[-+]?[\d.,]+(e[-+]?\d+)?|nan", "0", text)


@pytest.mark.parametrize("name", CASES)
def test_a_case_gives_what_is_recorded(name, tmp_path):
    recorded = json.loads(path_of(name).read_text(encoding="utf-8"))
    found = list(differences(observed(name, tmp_path.resolve()), recorded))
    assert not found, f"{len(found)} differences, the first of them:\n" + "\n".join(found[:12])


def test_nothing_is_recorded_that_is_not_a_case():
    assert {path.name for path in RECORDED.glob("*.json")} == {path_of(name).name for name in CASES}


def test_every_figure_is_compared():
    """The positive control: each kind of value, changed, is a difference."""
    recorded = {"files": {"rows": [{"mean": 1.5, "n": 3, "text": "x"}], "weights": "sha256 ab"}, "exit": 0}
    assert not list(differences(recorded, recorded))
    for changed in ({"exit": 2}, {"files": {"rows": [{"mean": 1.6, "n": 3, "text": "x"}], "weights": "sha256 ab"}},
                    {"files": {"rows": [{"mean": 1.5, "n": 4, "text": "x"}], "weights": "sha256 ab"}},
                    {"files": {"rows": [], "weights": "sha256 ab"}}, {"files": {"rows": recorded["files"]["rows"]}}):
        assert len(list(differences(recorded | changed, recorded))) == 1
