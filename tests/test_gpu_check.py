"""scripts/gpu_check.py: a dry run on the CPU, and sections that fail, hang or die, of which each ends alone."""

import json
import subprocess
import sys
import warnings
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
BROKEN = """
import os, subprocess, sys, time
import torch
asked, kept = [], vars(torch.cuda).copy()
for name in ("is_available", "device_count", "init", "_lazy_init", "get_device_capability"):
    setattr(torch.cuda, name, lambda *_, name=name: asked.append(name))
sys.path.insert(0, {folder!r})
import gpu_check
assert not asked, f"CUDA was started before sections are forked: {{asked}}"
vars(torch.cuda).update(kept)

def fails(check):
    "A measurement that fails."
    yield {{"case": 1}}, lambda: 1 / 0
    yield {{"case": 2}}, lambda: {{"figure": 2.0}}

def hangs(check):
    "A program that does not end."
    yield {{"case": 1}}, lambda: {{"pid": subprocess.Popen(["sleep", "600"]).pid}}
    yield {{"case": 2}}, lambda: time.sleep(600)

def dies(check):
    "A process that dies."
    yield {{"case": 1}}, lambda: {{}}
    yield {{"case": 2}}, lambda: os._exit(3)

def breaks(check):
    "An error between measurements."
    yield {{"case": 1}}, lambda: print("noise") or {{}}
    raise RuntimeError("no more cases\\nand why")

for cases, seconds in ((fails, 60), (hangs, 3), (dies, 60), (breaks, 60)):
    gpu_check.SECTIONS[cases.__name__] = gpu_check.Section(cases, seconds)
sys.exit(gpu_check.main(sys.argv[1:]))
"""


def dry_run(out, program, *sections):
    """(exit code, the sections' results, what was printed) of a dry run."""
    command = [sys.executable, *program, "--out", out, "--device", "cpu", "--tiny"]
    done = subprocess.run([*command, *(["--sections", ",".join(sections)] if sections else [])], cwd=ROOT, text=True,
                          capture_output=True, check=False)
    assert (out / "gpu_check.json").exists(), done.stderr
    return done.returncode, json.loads((out / "gpu_check.json").read_text())["sections"], done.stdout


@pytest.fixture(scope="module")
def gpu_check():
    found = spec_from_file_location("gpu_check", SCRIPT)
    sys.modules["gpu_check"] = module = module_from_spec(found)  # as dataclasses look it up
    found.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


def is_alive(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sections are forked, and looked for in /proc")
def test_a_section_that_fails_hangs_or_dies_takes_no_other_along(tmp_path):
    program = ["-c", BROKEN.format(folder=str(SCRIPT.parent))]
    code, found, said = dry_run(tmp_path, program, "fails", "hangs", "dies", "breaks", "tests", "loss", "draws")
    assert code == 1
    assert found["fails"]["ended"] == found["loss"]["ended"] == found["tests"]["ended"] == "done"
    assert found["fails"]["rows"] == [{"case": 1, "failed": "ZeroDivisionError: division by zero"},
                                      {"case": 2, "figure": 2.0}]
    assert found["hangs"]["ended"] == "stopped at its deadline of 3 s"
    assert found["hangs"]["seconds"] < 10
    assert not is_alive(found["hangs"]["rows"][0]["pid"])
    assert found["dies"] | {"seconds": 0} == {"about": "A process that dies.", "seconds": 0, "rows": [{"case": 1}],
                                              "ended": "ended early, with exit code 3"}
    assert found["breaks"]["ended"] == "RuntimeError: no more cases"
    assert "noise" not in said
    log = (tmp_path / "gpu_check.log").read_text()
    assert "noise" in log
    assert "ZeroDivisionError" in log
    assert all(row["ms"] > 0 and row["parts"] == 2 for row in found["loss"]["rows"])
    assert [row["equal"] for row in found["draws"]["rows"] if "equal" in row] == [True]
    assert "\n  case 2 | figure 2\n" in said


@pytest.mark.slow
def test_the_dry_run_measures_all_but_what_needs_cuda(tmp_path, gpu_check):
    code, found, _ = dry_run(tmp_path, [SCRIPT])
    assert code == 0
    assert list(found) == list(gpu_check.SECTIONS)
    failed = {(name, row.get("backend")) for name, section in found.items() for row in section["rows"]
              if "failed" in row}
    assert failed == {("attention", name) for name in ("xformers", "flash", "cudnn", "flex", "efficient")}
    assert {row["rule"] for row in found["traffic"]["rows"] if row["operations"] > 100} == set(gpu_check.RULES)
    assert all(row["graphs"] and not row["breaks"] and row["error"] < 0.01 for row in found["compile"]["rows"])
    assert all(row["equal"] for row in found["determinism"]["rows"])
    assert all(0 < row["host_ms"] < row["ms"] for row in found["steps"]["rows"] if "rule" in row)


@pytest.fixture
def on_cuda(gpu_check, tmp_path, monkeypatch):
    """A check on a CUDA device that nothing is run on."""
    monkeypatch.setattr(gpu_check, "now", lambda device: 0.0)
    check = gpu_check.Check("cuda", True, tmp_path / "log")
    vars(check)["device"] = torch.device("cuda")
    return check


def test_the_lines_that_wait_for_the_device_are_counted(gpu_check, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        for _ in range(3):
            warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, f"{ROOT}/looped/rng.py", 7)
        warnings.warn_explicit("something else", UserWarning, f"{ROOT}/looped/rng.py", 8)

    assert gpu_check.synchronisations(step) == {"syncs": 3, "where": {"looped/rng.py:7": 3}}
    assert modes == ["warn", "default"]


def test_kernels_are_what_ran_on_the_device_besides_copies_and_names_of_stretches(gpu_check, on_cuda, monkeypatch):
    def event(name, device=DeviceType.CPU, parent=None, annotation=False):
        return SimpleNamespace(name=name, device_type=device, cpu_parent=parent, is_user_annotation=annotation)

    linear = event("aten::linear")
    events = [linear, event("aten::addmm", parent=linear), event("cudaLaunchKernel"), event("cudaMemcpyAsync"),
              event("sgemm", DeviceType.CUDA), event("softmax", DeviceType.CUDA),
              event("Memcpy HtoD (Pinned -> Device)", DeviceType.CUDA),
              event("Optimizer.step", DeviceType.CUDA, annotation=True)]
    profile = nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile)
    assert gpu_check.launches(lambda: None, on_cuda) == {
        "operations": 1, "kernels": 2, "copies": {"Memcpy HtoD (Pinned -> Device)": 1}, "launches": 1}


def test_the_deadlines_of_the_sections_add_up_to_the_whole(gpu_check):
    assert sum(section.seconds for section in gpu_check.SECTIONS.values()) == gpu_check.SECONDS


def test_the_page_explains_each_section(gpu_check):
    page = (ROOT / "docs" / "performance.md").read_text()
    table = page[page.index("| section |"):].split("\n\n")[0].splitlines()[2:]
    assert [line.split("`")[1] for line in table] == list(gpu_check.SECTIONS)


def test_a_report_of_pytest_is_counted_and_each_failure_is_a_line(gpu_check, tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_well(): pass\n"
        "def test_ill(): assert 1 == 2, 'unlike\\nlines'\n"
        "def test_left_out(): pytest.skip('why')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('gone')\n"
        "def test_error(broken): pass\n")
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={tmp_path}/report.xml",
                    "test_it.py"], cwd=tmp_path, capture_output=True, check=False)
    found = gpu_check.outcomes(tmp_path / "report.xml")
    assert found["failures"] == {"test_it::test_ill": "AssertionError: unlike",
                                 "test_it::test_error": 'failed on setup with "OSError: gone"'}
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
