"""Atomic file writes and a single-writer lock for run folders, on any file system.

Network drives, exFAT, FUSE mounts, buckets and Windows may have no symbolic links, no `flock`, or no flush of a folder.
A run trains on all of them: each missing feature has a substitute below, and `lacking` reports what is lost.
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
"""Error codes of a call that the file system does not support. A full or failing disk gives other codes."""


# ---- atomic writes ---------------------------------------------------------------------------------------------------

def write_text(path: Path, text: str) -> None:
    """Write a small file atomically, with its line ends as given."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


@contextmanager
def of_run(path: Path) -> Iterator[None]:
    """Turns an error of writing `path`, a file of a run, into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or permissions, then run the "
                        f"same command again to resume") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file next to `path`, which then replaces it atomically."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")  # unique to this writer
    yield temporary
    sync(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync(path: Path) -> None:
    """Flush a file to the disk, if the file system can; Windows flushes only files opened for writing."""
    with open(path, "r+b") as file:
        _flushes(file.fileno())


def sync_folder(path: Path) -> bool:
    """Flush the entries of a folder to the disk; False if the file system cannot."""
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
    """False if the file system does not support the call; any other error is raised again."""
    if error.errno not in UNSUPPORTED:
        raise error
    return False


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, which is renamed to `out` at the end; after an error nothing is left.

    Raises UserError if `out` exists or cannot be written.
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


# ---- links -----------------------------------------------------------------------------------------------------------

def point(name: Path, target: Path) -> None:
    """Atomically point `name` to `target`, a folder next to or below it: by a link, or by NAME.txt with the path."""
    relative, text = target.relative_to(name.parent), name.with_name(f"{name.name}.txt")
    link = name.with_name(TEMPORARY + name.name)
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(relative, target_is_directory=True)
        os.replace(link, name)
    except (OSError, NotImplementedError):  # on a full disk write_text fails too, and its error is raised
        write_text(text, relative.as_posix() + "\n")
        _remove_link(name)
    else:
        text.unlink(missing_ok=True)
    sync_folder(name.parent)


def _remove_link(path: Path) -> None:
    """Remove an earlier link, which would point to an old target."""
    if path.is_symlink():
        path.unlink()


# ---- locks -----------------------------------------------------------------------------------------------------------

@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Lock a folder for writing. Raises UserError with the holder's name if another process holds it.

    The kernel releases the lock when its holder ends, however it ends. If the file system has no such locks, the lock
    is a file with the holder's process and machine: one left by a dead process is taken over on the same machine, and
    must be removed by hand on another.
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
    """The lock for `path`: a kernel lock on it if the file system has them, else a lock file next to it."""
    return FileLock(path) if locks(path.parent) else SoftFileLock(f"{path}{SOFT}")


def _holder(folder: Path) -> str:
    try:
        return (folder / HOLDER).read_text(encoding="utf-8")[:200].strip() or "another process"
    except (OSError, ValueError):
        return "another process"


def locks(folder: Path) -> bool:
    """True if the file system of a folder supports kernel locks."""
    try:
        import fcntl
    except ImportError:
        return os.name == "nt"  # Windows has its own, which filelock uses
    probe = folder / f"{TEMPORARY}lock-{os.getpid()}"
    try:
        with open(probe, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # held by another thread, or by a process of the same number on another machine
        return True
    except OSError as error:
        return _known(error)
    finally:
        probe.unlink(missing_ok=True)
    return True


# ---- missing guarantees ----------------------------------------------------------------------------------------------

def lacking(folder: Path) -> list[str]:
    """Guarantees that the file system of a folder lacks, each with its consequence for a run."""
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
