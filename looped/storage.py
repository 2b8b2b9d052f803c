"""Files of a run on any file system: written whole or not at all, and held by one writer.

Network drives, exFAT, FUSE mounts, buckets and Windows may have no symbolic links, no `flock`, or no flush of a folder.
A run trains on all of them: what takes the missing thing's place is below, beside it, and `lacking` says what is lost.
"""

import errno
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from looped.errors import UserError

Lock = FileLock | SoftFileLock

TEMPORARY = ".tmp-"
LOCK, SOFT, HOLDER = ".lock", "-soft", ".lock-holder"
SOFT_LOCK = LOCK + SOFT

UNSUPPORTED = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY,
               errno.EBADF, errno.EISDIR, errno.ENOLCK}
"""The errors of a file system for a call it does not have. A full or a failing disk answers otherwise."""


# ---- whole files -----------------------------------------------------------------------------------------------------

def write_text(path: Path, text: str) -> None:
    """Write a small file in one go, its line ends as given: the old content or the new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which then takes its place in one go."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")  # no other writer's
    yield temporary
    sync(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync(path: Path) -> None:
    """Flush a file to the disk, where the file system can; Windows flushes only what may be written."""
    with open(path, "r+b") as file:
        _flushes(file.fileno())


def sync_folder(path: Path) -> bool:
    """Flush the names in a folder to the disk; False where the file system has no way to."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        return _known(error)
    try:
        return _flushes(handle)
    finally:
        os.close(handle)


def _flushes(handle: int) -> bool:
    try:
        os.fsync(handle)
    except OSError as error:
        return _known(error)
    return True


def _known(error: OSError) -> bool:
    """False for a call that the file system does not have; any other error is raised again."""
    if error.errno not in UNSUPPORTED:
        raise error
    return False


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when all of it is there; after an error there is nothing.

    Raises UserError where `out` exists, and where the disk refuses.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out} exists; choose another --out, or remove it")
    temporary = out.parent / f"{TEMPORARY}{out.name}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, out)
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; free space or permissions, or choose another "
                        f"--out") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- a name for a file -----------------------------------------------------------------------------------------------

def point(name: Path, target: Path) -> None:
    """Make `name` lead to `target`, a folder beside or below it, in one go: a link, or NAME.txt with the path in it."""
    relative, text = target.relative_to(name.parent), name.with_name(f"{name.name}.txt")
    link = name.with_name(TEMPORARY + name.name)
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(relative, target_is_directory=True)
        os.replace(link, name)
    except (OSError, NotImplementedError):  # a full disk refuses the text as well, and is told then
        write_text(text, relative.as_posix() + "\n")
        _remove_link(name)
    else:
        text.unlink(missing_ok=True)
    sync_folder(name.parent)


def _remove_link(path: Path) -> None:
    """A link of before, which would lead to an old target."""
    if path.is_symlink():
        path.unlink()


# ---- one writer ------------------------------------------------------------------------------------------------------

@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a folder for writing. Raises UserError that names the holder where another process has it.

    The lock is one that the kernel gives up when its holder ends, however it ends. Where the file system has none, it
    is a file with the holder's process and machine in it: one left by a process that is gone is taken over on the same
    machine, and elsewhere has to be removed by hand.
    """
    kernel, lock = locks(folder), lock_for(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"run {folder} is in use by {_holder(folder)}; wait for it to end, or choose another --run"
                        + ("" if kernel else f" (if no process writes to it, remove {lock.lock_file})")) from None
    try:
        (folder / HOLDER).write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8", newline="")
        yield
    finally:
        with suppress(OSError):
            (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def lock_for(path: Path) -> Lock:
    """The lock that the file system under `path` has: at `path` the kernel's, else a file of its own beside it."""
    return FileLock(path) if locks(path.parent) else SoftFileLock(f"{path}{SOFT}")


def _holder(folder: Path) -> str:
    try:
        return (folder / HOLDER).read_text(encoding="utf-8")[:200].strip() or "another process"
    except (OSError, ValueError):
        return "another process"


def locks(folder: Path) -> bool:
    """True if the file system of a folder has locks of the kernel."""
    try:
        import fcntl
    except ImportError:
        return os.name == "nt"  # which has its own, and filelock knows it
    probe = folder / f"{TEMPORARY}lock-{os.getpid()}"
    try:
        with open(probe, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # somebody of the same number, on another machine or in another thread, has it
        return True
    except OSError as error:
        return _known(error)
    finally:
        probe.unlink(missing_ok=True)
    return True


# ---- what is lost ----------------------------------------------------------------------------------------------------

def lacking(folder: Path) -> list[str]:
    """The guarantees that the file system of a folder lacks, each with what it means for a run."""
    found = []
    if not locks(folder):
        found.append(f"file locks (the run is held by {SOFT_LOCK}, which a killed process leaves behind)")
    if not _links(folder):
        found.append("symbolic links (latest.txt names the newest checkpoint)")
    if not sync_folder(folder):
        found.append("a flush of folders (after a power cut the newest checkpoint may be missing)")
    return found


def _links(folder: Path) -> bool:
    probe = folder / f"{TEMPORARY}link-{os.getpid()}"
    try:
        probe.unlink(missing_ok=True)
        probe.symlink_to("nowhere", target_is_directory=True)
        probe.unlink()
    except (OSError, NotImplementedError):
        return False
    return True
