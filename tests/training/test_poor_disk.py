"""Runs on file systems that lack what a disk of Linux has: no links, no locks of the kernel, no flush of folders.

What is missing is stubbed to answer as such a file system does; the run has to be, bit for bit, the one on a good disk.
"""

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from same_runs import assert_same

from looped.atomic_files import lacking, lock_for, point, sync, sync_folder
from looped.config import dump_config
from looped.errors import UserError
from looped.training.callbacks import Callback
from looped.training.checkpoint import list_checkpoints
from looped.training.runs import load_run, open_run
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

FREE_OF_CHARGE = {"training.budget": 4, "training.checkpoint_every": 1, "training.keep_checkpoints": 9}


def refuse(monkeypatch, code, missing):
    """Let the calls of Python that `missing` names fail with an error number, as the file system would have it."""
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    if "links" in missing:
        monkeypatch.setattr(os, "symlink", fail)
    if "locks" in missing:
        monkeypatch.setattr(fcntl, "flock", fail)
    if "flush" in missing:
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: fail() if stat.S_ISDIR(os.fstat(fd).st_mode) else fsync(fd))
    if "folders" in missing:  # cannot be opened at all, as on Windows, where shutil does not try to
        monkeypatch.setattr(shutil, "_use_fd_functions", False)
        real = os.open
        monkeypatch.setattr(os, "open", lambda path, *a, **k: fail() if os.path.isdir(path) else real(path, *a, **k))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny):
    run = tmp_path_factory.mktemp("good") / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a good disk has nothing to warn of
        train(tiny(**FREE_OF_CHARGE), run)
    return run


def told(caught):
    return [str(each.message) for each in caught if "file system without" in str(each.message)]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS])
@pytest.mark.parametrize("missing", [("links",), ("locks",), ("flush",), ("links", "locks", "folders")])
def test_a_run_trains_saves_and_resumes_where_the_file_system_lacks(undisturbed, tmp_path, tiny, monkeypatch, code,
                                                                   missing):
    refuse(monkeypatch, code, missing)
    config, run = tiny(**FREE_OF_CHARGE), tmp_path / "run"

    class Stop(Callback):
        def on_step(self, trainer):
            if trainer.done.step == 4:
                raise KeyboardInterrupt  # before the checkpoint of this step

    with pytest.warns(UserWarning, match="file system without") as caught, pytest.raises(KeyboardInterrupt):
        train(config, run, callbacks=[Stop()])
    assert len(told(caught)) == 1
    assert len(list_checkpoints(run)) == 3
    with pytest.warns(UserWarning, match="file system without") as caught:
        train(config, run)
    assert len(told(caught)) == 1
    assert len(list_checkpoints(run)) == 4
    assert_same(run, undisturbed)
    assert load_run(run).step == 4
    newest = "checkpoints/step-00000004"
    if "links" in missing:
        assert (run / "latest.txt").read_text(encoding="utf-8").strip() == newest
        assert not os.path.lexists(run / "latest")
    else:
        assert os.readlink(run / "latest") == newest
        assert not (run / "latest.txt").exists()
    assert not list(run.rglob(".tmp-*"))


def test_a_good_disk_lacks_nothing_and_the_warning_names_what_is_lost(tmp_path, monkeypatch):
    assert lacking(tmp_path) == []
    refuse(monkeypatch, errno.ENOTSUP, ("links", "locks", "flush"))
    assert [each.split(" (")[0] for each in lacking(tmp_path)] == ["file locks", "symbolic links", "a flush of folders"]


def test_a_link_of_before_does_not_outlive_the_links(tmp_path, monkeypatch):
    """A run of a good disk, gone on with elsewhere, and back again."""
    old, new = tmp_path / "checkpoints" / "a", tmp_path / "checkpoints" / "b"
    for folder in (old, new):
        folder.mkdir(parents=True)
    point(tmp_path / "latest", old)
    assert (tmp_path / "latest").resolve() == old.resolve()
    with monkeypatch.context() as patch:
        refuse(patch, errno.EPERM, ("links",))
        point(tmp_path / "latest", new)
    assert (tmp_path / "latest.txt").read_text(encoding="utf-8") == "checkpoints/b\n"
    assert not os.path.lexists(tmp_path / "latest")
    point(tmp_path / "latest", old)
    assert (tmp_path / "latest").resolve() == old.resolve()
    assert not (tmp_path / "latest.txt").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "data.json", "metrics.jsonl"])
def test_a_full_disk_is_one_sentence_whichever_file_meets_it(tmp_path, tiny, monkeypatch, name):
    run, written = tmp_path / "run", Path.write_text

    def write(path, *args, **kwargs):
        if path.name.endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(path, *args, **kwargs)

    if name == "metrics.jsonl":  # a line after the newest checkpoint, which is dropped when the run is resumed
        train(tiny(**FREE_OF_CHARGE), run)
        with (run / name).open("a") as file:
            file.write('{"kind": "train", "step": 9}\n')
    monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(UserError, match=rf"cannot write .*{name}: No space left on device; free space"):
        train(tiny(**FREE_OF_CHARGE), run)
    monkeypatch.undo()
    assert train(tiny(**FREE_OF_CHARGE), run).step == 4


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failing_or_a_full_disk_is_not_taken_for_one_that_lacks(tmp_path, monkeypatch, code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    (tmp_path / "file").write_text("x", encoding="utf-8")
    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(os, "symlink", fail)
    monkeypatch.setattr(fcntl, "flock", fail)
    for call in (lambda: sync_folder(tmp_path), lambda: sync(tmp_path / "file"), lambda: lock_for(tmp_path / "lock"),
                 lambda: point(tmp_path / "latest", tmp_path / "file")):
        with pytest.raises(OSError, match=os.strerror(code)):
            call()


HOLD = """
import errno, fcntl, sys, time
def fail(*args): raise OSError(errno.ENOTSUP, "not supported")
fcntl.flock = fail
from looped.config import load_config
from looped.training.runs import open_run
with open_run(load_config(sys.argv[2]), sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.filterwarnings("ignore:run .* is on a file system without")
def test_without_locks_of_the_kernel_a_second_writer_is_still_refused_and_a_killed_one_is_not(tmp_path, tiny,
                                                                                             monkeypatch):
    config, run = tiny(), tmp_path / "run"
    (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
    refuse(monkeypatch, errno.ENOTSUP, ("locks",))
    holder = subprocess.Popen([sys.executable, "-c", HOLD, run, tmp_path / "c.yaml"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with (pytest.raises(UserError, match=rf"in use by process {holder.pid} .*remove .*lock-soft"),
              open_run(config, run)):
            pass
    finally:
        holder.kill()
        holder.wait()
    with open_run(config, run):
        pass
    assert not [path.name for path in run.iterdir() if path.name.startswith((".lock-", ".tmp-"))]


def test_two_of_one_process_do_not_hold_a_run_at_once(tmp_path, tiny):
    with (open_run(tiny(), tmp_path / "run"), pytest.raises(UserError, match=f"in use by process {os.getpid()} "),
          open_run(tiny(), tmp_path / "run")):
        pass


def test_a_token_cache_is_built_without_locks_of_the_kernel(tmp_path, tiny, monkeypatch):
    refuse(monkeypatch, errno.ENOTSUP, ("locks",))
    with pytest.warns(UserWarning, match="without file locks"):
        train(tiny(**FREE_OF_CHARGE, **{"data.cache_dir": str(tmp_path / "cache")}), tmp_path / "run")
    assert len(list((tmp_path / "cache").glob("*/train.bin"))) == 1
