"""Tensors of a checkpoint in shards: safetensors files that each process wrote of its own parts, by
torch.distributed.checkpoint. A file's header says where its parts belong, so any number of processes reads them.

    step-00001000/model/shard-00001-model-00001-of-00001.safetensors  shard-00002-...  (one or more files per process)
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from looped.errors import UserError, one_line

FILE_BYTES = 64 << 20
"""Size from which a process begins another file. Python is at a standstill while a file is put together in memory, and
with it the training that goes on meanwhile."""


def write_shards(folder: Path, tensors: Mapping[str, Tensor], group: Any) -> None:
    """Write this process's parts of `tensors`; all processes of `group` call it together. Raises OSError on all if a
    process cannot write, naming the first one that cannot."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files(tensors), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:  # of all processes
        raise OSError(None, _first(error)) from None


def own_files(folder: Path, rank: int) -> list[Path]:
    """The files that the process `rank` has written."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


def read_shards(folder: Path, into: Mapping[str, Tensor], *, alone: bool) -> None:
    """Fill `into` with the saved values: whole tensors, or this process's parts of DTensors.

    alone: without the other processes, which otherwise call it together. Raises UserError if it cannot be read.
    """
    from torch.distributed import checkpoint as dcp

    with _failures(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked
        dcp.load(dict(into), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone)


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """The saved tensors without values, on the device "meta"."""
    from torch.distributed import checkpoint as dcp

    with _failures(folder):
        found: Any = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
            for name, tensor in found.items()}


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensor name -> number of its file, from 1 on. The same for all processes, so by the size of the largest part."""
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        own = _part_bytes(tensor)
        if size and size + own > FILE_BYTES:
            number, size = number + 1, 0
        numbers[name] = number
        size += own
    return numbers


def _part_bytes(tensor: Any) -> int:
    parts = tensor.device_mesh.size() if hasattr(tensor, "device_mesh") else 1
    return math.ceil(tensor.numel() * tensor.element_size() / parts)


@contextmanager
def _failures(folder: Path) -> Iterator[None]:
    """Turn the errors of reading, which are gathered from all processes, into a UserError."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        reason = _first(error)
    except (OSError, SafetensorError) as error:
        reason = one_line(error)
    else:
        return
    raise UserError(f"cannot read {folder}: {reason}; use another checkpoint")


def _first(error: Any) -> str:
    """The failure of the first process that has one, in one line."""
    rank, (reason, _) = min(error.failures.items())
    return f"rank {rank}: {getattr(reason, 'strerror', None) or one_line(reason)}"
