"""The differences of Windows, stubbed: modules and signals that are not there, line ends, encodings."""

import ast
import builtins
import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from same_runs import assert_same

import looped
from looped.cli import main
from looped.compare.runner import Child
from looped.config import dump_config
from looped.cost.arm_timing import Arm
from looped.training.train import train

ROOT = Path(looped.__file__).parents[1]

IMPORTS = """
import importlib, pkgutil, sys
import looped
def import_all():
    for module in pkgutil.walk_packages(looped.__path__, "looped."):
        importlib.import_module(module.name)
    return sum(name.startswith("looped.") for name in sys.modules)
num = import_all()  # with all that others need of this system
for name in [name for name in sys.modules if name.startswith("looped.")]:
    del sys.modules[name]
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
system, sys.platform = sys.platform, "win32"
assert import_all() == num > 150
sys.platform = system
from looped.atomic_files import hold
import pathlib
with hold(pathlib.Path(sys.argv[1])):
    print("held")
"""


def test_every_module_is_imported_and_a_run_held_without_what_posix_alone_has(tmp_path):
    done = subprocess.run([sys.executable, "-c", IMPORTS, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.stdout == "held\n", done.stderr[-3000:]


def of_windows(real):
    """`open` of Windows: text is of code page 1252, and written with its line ends, where nobody says otherwise."""
    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *more, **kwargs):
        if "b" not in mode and encoding is None:
            encoding = "cp1252"
        if "b" not in mode and newline is None and set(mode) & set("wax+"):
            newline = "\r\n"
        return real(file, mode, buffering, encoding, errors, newline, *more, **kwargs)

    return opened


def test_a_run_writes_the_same_bytes_and_is_measured(tmp_path, tiny, monkeypatch):
    config = tiny(**{"training.budget": 2, "training.checkpoint_every": 1, "evaluation.depths": [1],
                     "data.cache_dir": str(tmp_path / "cache")})
    train(config, tmp_path / "usual")
    with monkeypatch.context() as patch:
        for module in (builtins, io):
            patch.setattr(module, "open", of_windows(open))
        (tmp_path / "control.txt").write_text("a\n")
        train(config.replace(**{"data.cache_dir": str(tmp_path / "other")}), tmp_path / "run")
        assert main(["eval", str(tmp_path / "run")]) == 0
    assert (tmp_path / "control.txt").read_bytes() == b"a\r\n"  # what the stub is for
    assert_same(tmp_path / "run", tmp_path / "usual")
    written = [path for folder in ("run", "other") for path in (tmp_path / folder).rglob("*")
               if path.suffix in (".json", ".jsonl", ".yaml", ".md", ".log", ".txt")]
    assert {"stamp.json", "metrics.jsonl", "depth.jsonl", "meta.json", "train.log"} <= {path.name for path in written}
    assert not [path for path in written if b"\r" in path.read_bytes()]


OTHER_OPENS = {"gzip", "Image", "os", "find_data", "find_text", "found", "text", "stream", "part", "self"}
"""Objects whose `open` opens no file of text."""


def text_calls(tree):
    """Calls that read or write text, each with the keyword arguments it has to have."""
    for node in ast.walk(tree):
        name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else (
            node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else "")
        value = node.func.value if name == "open" and isinstance(node.func, ast.Attribute) else None
        owner = getattr(value.func if isinstance(value, ast.Call) else value, "id", "")
        if name in ("write_text", "read_text") and isinstance(node.func, ast.Attribute):
            yield node, {"encoding", "newline"} if name == "write_text" else {"encoding"}
        if name == "open" and owner not in OTHER_OPENS:
            modes = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            mode = next((each for each in modes if set(each) <= set("rwaxb+t")), "r")
            if "b" not in mode:
                yield node, {"encoding"} | ({"newline"} if set(mode) & set("wax+") else set())


@pytest.mark.parametrize("folder", ["looped", "tasks", "scripts"])
def test_text_is_read_by_its_encoding_and_written_with_its_line_ends(folder):
    found = 0
    for path in (ROOT / folder).rglob("*.py"):
        for node, needed in text_calls(ast.parse(path.read_text(encoding="utf-8"))):
            given = {keyword.arg for keyword in node.keywords}
            assert needed <= given, f"{path}:{node.lineno} needs {needed - given}"
            found += 1
    assert found


def test_a_failed_child_is_accounted_for_where_there_is_no_sigkill(tiny, monkeypatch):
    with Arm("bad", tiny(), 1, module="looped.no_such_module") as arm, monkeypatch.context() as patch:
        patch.delattr(signal, "SIGKILL")
        assert "ModuleNotFoundError" in arm._cause()


def test_a_signal_that_a_process_cannot_be_sent_is_left_to_the_console():
    class Process:
        def send_signal(self, number):
            raise ValueError(f"Unsupported signal: {number}")

    child = Child.__new__(Child)
    child.process, child.told = Process(), 0
    child.tell(signal.SIGINT)
    assert child.told == signal.SIGINT


def test_what_a_terminal_cannot_show_is_escaped(tmp_path, tiny):
    """In a process whose output has the old encoding, as Windows gives a pipe."""
    (tmp_path / "c.yaml").write_text(dump_config(tiny()), encoding="utf-8")
    code = ("import sys; from looped.cli import main; sys.stdout.reconfigure(encoding='cp1252'); "
            "import looped.cli as cli; cli.HELP = '\\u2200 depth'; sys.exit(main([]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, b"\\u2200 depth"), done.stderr[-1000:]
