"""Checkpoints of a run in training, written in the background from a copy of the tensors in host memory.

Training waits for the copy, and for the checkpoint before if that is still being written. A whole model is written by
the first process, a sharded one by all of them, each its parts.
"""

from collections import ChainMap
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from looped.training.checkpoint import (
    SHARDED_FORMAT,
    Tensors,
    file_hash,
    finish_checkpoint,
    new_checkpoint,
    save_checkpoint,
    writing,
)
from looped.training.processes import Processes
from looped.training.shards import own_files, write_shards


@runtime_checkable
class Copying(Protocol):
    """A copy of the tensors of each part of a checkpoint. Later copies may overwrite it."""

    def stage(self, state_dict: dict[str, Tensors]) -> Any: ...


class NoCopy:
    """The tensors themselves, for training that waits until they are written."""

    def stage(self, state_dict: dict[str, Tensors]) -> dict[str, Tensors]:
        return state_dict


class HostCopy:
    """A copy in host memory, pinned for tensors of a CUDA device."""

    def __init__(self):
        self.buffers: dict[tuple[str, str], Tensor] = {}

    def stage(self, state_dict: dict[str, Tensors]) -> dict[str, Tensors]:
        """The tensors of each part, as they are now."""
        copies = {part: {name: self._copy((part, name), tensor.detach()) for name, tensor in tensors.items()}
                  for part, tensors in state_dict.items()}
        if torch.cuda.is_available():  # which copies to pinned memory without waiting
            torch.cuda.synchronize()
        return copies

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        if key not in self.buffers:
            self.buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return self.buffers[key].copy_(tensor, non_blocking=True)


def shard_copy() -> Copying:
    """A copy in host memory of this process's parts of a sharded model."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    cuda = torch.cuda.is_available()
    return DefaultStager(StagingOptions(use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False,
                                        use_non_blocking_copy=cuda))


class AtOnce(Executor):
    """Work that is done before the next line, in place of a thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # raised by `result`, as one of a thread is; a second Ctrl-C ends at once
            future.set_exception(error)
        return future


class Saver:
    """Writes the checkpoints of a whole model, on the first process."""

    copies: Callable[[], Copying] = HostCopy

    def __init__(self, run_dir: Path, keep: int, processes: Processes, *, background: bool):
        self.run_dir = run_dir
        self.keep = keep
        self.processes = processes
        self.copy: Copying = type(self).copies() if background else NoCopy()
        self.worker: Executor = ThreadPoolExecutor(1) if background else AtOnce()
        self.pending: Future[Any] | None = None
        self.reserved = False

    @property
    def works(self) -> bool:
        """True if this process writes anything."""
        return self.processes.is_first

    def reserve(self, tensors: Callable[[], dict[str, Tensors]]) -> None:
        """Take the memory of the copy once, in the background, so that the first checkpoint does not wait for it."""
        if self.works and not self.reserved:
            self.pending = self.worker.submit(self.copy.stage, tensors())
        self.reserved = True

    def save(self, tensors: dict[str, Tensors], state: dict[str, Any]) -> None:
        """Write a checkpoint of the tensors (part -> name -> tensor) as they are now, with `state`. Raises UserError on
        all processes if the one before could not be written."""
        self.wait()
        if self.works:
            self.pending = self.worker.submit(self.write, self.copy.stage(tensors), state)

    def write(self, tensors: dict[str, Tensors], state: dict[str, Any]) -> None:
        """Write a checkpoint; in the background."""
        save_checkpoint(self.run_dir, state["step"], tensors, state, self.keep)

    @property
    def failed(self) -> bool:
        """True if this process has failed to write the last checkpoint."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises UserError on all processes if it could not be."""
        self.processes.first(self._wait)

    def _wait(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread, after its last write."""
        self.worker.shutdown()


class ShardSaver(Saver):
    """Writes the checkpoints of a sharded model: each process its parts, and the first one state.json with the hashes,
    once all are there. The processes agree in a group of their own, beside that of training."""

    copies = staticmethod(shard_copy)

    def __init__(self, run_dir: Path, keep: int, processes: Processes, *, background: bool):
        super().__init__(run_dir, keep, processes, background=background)
        self.rank: int = torch.distributed.get_rank()
        self.group: Any = torch.distributed.new_group(backend="gloo")

    @property
    def works(self) -> bool:
        return True

    def write(self, tensors: dict[str, Tensors], state: dict[str, Any]) -> None:
        with writing(self.run_dir, state["step"]):
            folder = self._first(lambda: new_checkpoint(self.run_dir, state["step"]))
            for part, named in tensors.items():
                write_shards(folder / part, named, self.group)
            hashes = self._each(lambda: {file.relative_to(folder).as_posix(): file_hash(file)
                                         for part in tensors for file in own_files(folder / part, self.rank)})
            self._first(lambda: finish_checkpoint(self.run_dir, folder, {"format": SHARDED_FORMAT, **state},
                                                  dict(ChainMap(*hashes)), self.keep))

    def wait(self) -> None:
        self._wait()  # all have the same error

    def _first(self, work: Callable[[], Any]) -> Any:
        """Result of `work()` on the first process, given to all."""
        return self._each(lambda: work() if self.rank == 0 else None)[0]

    def _each(self, work: Callable[[], Any]) -> list[Any]:
        """Results of `work()` on all processes. Raises OSError on all if one of them does."""
        try:
            own = work(), None
        except OSError as error:
            own = None, error.strerror or str(error)
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, own, group=self.group)
        for rank, (_, problem) in enumerate(found):
            if problem is not None:
                raise OSError(None, f"rank {rank}: {problem}")
        return [value for value, _ in found]

