"""Checkpoints without pickle: safetensors and JSON in one folder per step, written atomically and hashed.

    run/checkpoints/step-00001000/  model.safetensors  ema.safetensors  optimizer.safetensors  state.json
    run/latest -> checkpoints/step-00001000  (latest.txt, if there are no links)

A folder is written under a temporary name, flushed to the disk, then renamed, so a kill at any moment leaves intact
checkpoints and, at worst, one temporary folder that the next writer removes. state.json holds the SHA-256 of the other
files and of itself. Optimiser state is stored by parameter name, which `Optimizer.state_dict()` supports since torch
2.6. In format 2, that of a sharded model, a folder of shards (`looped.training.shards`) takes the place of each file
of tensors; format 1 has files alone. Neither says how many processes wrote it.
"""

import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from looped.atomic_files import TEMPORARY, point, sync, sync_folder, write_text
from looped.errors import UserError, one_line
from looped.training.shards import read_shards, saved_tensors

FORMAT, SHARDED_FORMAT = 1, 2
STATE = "state.json"
ANY_BUDGET = "any_budget"
"""Key of the state: true if no step up to there had a learning rate that depends on the budget, so that another budget
may continue from it."""

Tensors = dict[str, Tensor]


class DamagedError(Exception):
    """A damaged checkpoint, with the reason."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Folders of finished checkpoints, newest first."""
    found = (path for path in (run_dir / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdigit())
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step-"))


# ---- writing ---------------------------------------------------------------------------------------------------------

def save_checkpoint(run_dir: Path, step: int, tensors: dict[str, Tensors], state: dict[str, Any], keep: int, *,
                    streams: Mapping[str, "Stream"] = MappingProxyType({})) -> Path:
    """Write `tensors` (file name without ending -> tensors), `streams` and `state`, move `latest`, and delete all but
    the newest `keep` checkpoints.

    Raises UserError if writing fails; earlier checkpoints stay.
    """
    with writing(run_dir, step):
        folder = new_checkpoint(run_dir, step)
        writers = {name: partial(save_file, {key: tensor.detach().contiguous() for key, tensor in named.items()})
                   for name, named in tensors.items()} | {name: stream.write for name, stream in streams.items()}
        hashes = {}
        for name, write in writers.items():
            path = folder / f"{name}.safetensors"
            write(path)
            sync(path)
            hashes[path.name] = file_hash(path)
        return finish_checkpoint(run_dir, folder, {"format": FORMAT, "step": step, **state}, hashes, keep)


@contextmanager
def writing(run_dir: Path, step: int) -> Iterator[None]:
    """Turn what a disk refuses inside the block into a UserError, and leave no half-written checkpoint."""
    try:
        yield
    except (OSError, SafetensorError, UserError) as error:
        shutil.rmtree(_temporary(run_dir, step), ignore_errors=True)
        last = list_checkpoints(run_dir)
        raise UserError(f"cannot write checkpoint {checkpoint_path(run_dir, step)}: "
                        f"{getattr(error, 'strerror', None) or error}; free space or permissions, then run the same "
                        f"command again to resume from {last[0].name if last else 'the start'}") from None


def newest_hash(run_dir: Path) -> str:
    """Hash of the tensors of a run's newest checkpoint; the run has at least one."""
    return _hash_json(json.loads((list_checkpoints(run_dir)[0] / STATE).read_text(encoding="utf-8"))["sha256"])


def new_checkpoint(run_dir: Path, step: int) -> Path:
    """Make and return the empty folder that becomes the checkpoint of `step`."""
    temporary = _temporary(run_dir, step)
    _discard(temporary)
    temporary.mkdir(parents=True)
    return temporary


def finish_checkpoint(run_dir: Path, folder: Path, state: dict[str, Any], hashes: Mapping[str, str],
                      keep: int) -> Path:
    """Write state.json, with the hash of each file by its path in `folder`; give the folder its name, move `latest` and
    delete all but the newest `keep` checkpoints and the newest one whose state says that it suits `any_budget`."""
    state = {**state, "sha256": dict(hashes)}
    write_text(folder / STATE, json.dumps({**state, "self": _hash_json(state)}, indent=1))
    final = checkpoint_path(run_dir, state["step"])
    if final.exists():  # the same step written again after an older checkpoint was resumed
        _discard(final)
    os.rename(folder, final)
    sync_folder(final.parent)
    point_latest(run_dir, final)
    kept = list_checkpoints(run_dir)
    spared = next(filter(_suits_any_budget, kept), None)
    for old in kept[keep:]:
        if old != spared:
            _discard(old)
    return final


def _suits_any_budget(checkpoint: Path) -> bool:
    """True if another budget may continue from a checkpoint; a damaged one does not."""
    try:
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get(ANY_BUDGET) is True
    except (OSError, ValueError, AttributeError):
        return False


def _temporary(run_dir: Path, step: int) -> Path:
    final = checkpoint_path(run_dir, step)
    return final.with_name(f"{TEMPORARY}{final.name}")


@dataclass(frozen=True)
class Stream:
    """Float32 tensors that are written one by one, so that they are never all in memory. shapes: name -> shape of every
    tensor; tensors: (name, tensor) pairs, each name once, in any order."""

    shapes: Mapping[str, Sequence[int]]
    tensors: Iterable[tuple[str, Tensor]]

    def write(self, path: Path) -> None:
        """Write a safetensors file: the length of the JSON header, the header, and the data at the header's offsets."""
        ends = list(itertools.accumulate(4 * math.prod(shape) for shape in self.shapes.values()))
        header = {name: {"dtype": "F32", "shape": list(shape), "data_offsets": [end - 4 * math.prod(shape), end]}
                  for (name, shape), end in zip(self.shapes.items(), ends, strict=True)}
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)  # data begin at a multiple of eight bytes
        with open(path, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name, tensor in self.tensors:
                file.seek(8 + len(head) + header.pop(name)["data_offsets"][0])
                file.write(np.ascontiguousarray(tensor.numpy(), dtype="<f4").data)
        assert not header, f"{next(iter(header))} was never given"


def point_latest(run_dir: Path, checkpoint: Path) -> None:
    """Point `latest` to a checkpoint, atomically."""
    point(run_dir / "latest", checkpoint)


def remove_leftovers(run_dir: Path) -> None:
    """Delete temporary files of killed writers; only the holder of the run's lock may call this."""
    for path in [*run_dir.glob(f"{TEMPORARY}*"), *(run_dir / "checkpoints").glob(f"{TEMPORARY}*")]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _discard(folder: Path) -> None:
    """Delete a folder; it is renamed first, so that a kill leaves no partial checkpoint under its name."""
    if folder.exists():
        hidden = folder.with_name(f"{TEMPORARY}old-{folder.name.removeprefix(TEMPORARY)}")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(folder, hidden)
        shutil.rmtree(hidden)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_json(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


# ---- reading ---------------------------------------------------------------------------------------------------------

def check(path: Path) -> dict[str, Any]:
    """Check the hash of every file of a checkpoint and return its state; raises DamagedError."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state.pop("self") != _hash_json(state):
            raise DamagedError(f"{STATE} does not match its own hash")
        if state["format"] not in (FORMAT, SHARDED_FORMAT):
            raise UserError(f"checkpoint {path} has format {state['format']}, this version of looped reads {FORMAT} "
                            f"and {SHARDED_FORMAT}; use the version named in stamp.json")
        for name, digest in state["sha256"].items():
            if file_hash(path / name) != digest:
                raise DamagedError(f"{name} does not match its recorded hash")
    except FileNotFoundError as error:
        raise DamagedError(f"{Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedError(f"{STATE} cannot be read") from None
    except OSError as error:
        raise DamagedError(f"{error.strerror or error}") from None
    return state


def newest_good(run_dir: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint and its state, None if there is none yet; `say` gets one line per damaged one.

    Raises UserError if there are checkpoints and all of them are damaged.
    """
    damaged = []
    for path in list_checkpoints(run_dir):
        try:
            return path, check(path)
        except DamagedError as reason:
            damaged.append(f"checkpoint {path} is damaged: {reason}")
            say(damaged[-1] + "; looking for an older one")
    if damaged:
        raise UserError(f"{damaged[0]}, and no older one is intact; restore one, or remove {run_dir / 'checkpoints'} "
                        f"to start over")
    return None


def set_aside(run_dir: Path, newer_than: int, why: str = "damaged") -> list[Path]:
    """Rename the checkpoints newer than the resumed one, so that they count neither as kept nor as newest; return their
    new paths."""
    moved = []
    for path in list_checkpoints(run_dir):
        if step_of(path) > newer_than:
            aside = path.with_name(f"{why}-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            moved.append(aside)
    return moved


def part_of(checkpoint: Path, name: str) -> Path:
    """The file of tensors of a checkpoint, or their folder of shards: `name` is model, ema or optimizer."""
    shards = checkpoint / name
    return shards if shards.is_dir() else checkpoint / f"{name}.safetensors"


def load_tensors(checkpoint: Path, name: str) -> Tensors:
    """Whole tensors of one part of a checkpoint, from its file or shards. Raises UserError if it cannot be read."""
    part = part_of(checkpoint, name)
    if part.is_dir():
        tensors = {key: torch.empty_like(tensor, device="cpu") for key, tensor in saved_tensors(part).items()}
        read_shards(part, tensors, alone=True)
        return tensors
    with reading(part):
        return load_file(part)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn the errors of reading a file of tensors into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {one_line(error)}; use another checkpoint") from None


def module_tensors(module: nn.Module) -> Tensors:
    """State of a module with each storage once: a tied tensor is stored under its first name."""
    seen, tensors = set(), {}
    for name, tensor in module.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() == 0 or place not in seen:
            tensors[name] = tensor
        seen.add(place)
    return tensors


def load_module(module: nn.Module, tensors: Tensors, source: Path) -> None:
    """Copy saved tensors into a module that must have exactly these names, shapes and dtypes."""
    copy_tensors(module_tensors(module), tensors, source)


@torch.no_grad()
def copy_tensors(into: Tensors, tensors: Tensors, source: Path) -> None:
    """Copy saved tensors, in place, into those of exactly the same names, shapes and dtypes."""
    check_same(into, tensors, source)
    for name, tensor in into.items():
        tensor.copy_(tensors[name])


def check_same(expected: Tensors, found: Tensors, source: Path) -> None:
    """Raises UserError for the first tensor in which a checkpoint and a config's model differ."""
    way_out = "use the config.yaml of its own run"
    for name, tensor in expected.items():
        if name not in found:
            raise UserError(f"{source} has no tensor '{name}', which the config's model needs; {way_out}")
        for what in ("shape", "dtype"):
            ours, theirs = getattr(tensor, what), getattr(found[name], what)
            if ours != theirs:
                raise UserError(f"{source}: tensor '{name}' has {what} {_plain(theirs)}, but the config "
                                f"gives {_plain(ours)}; {way_out}")
    for name in found:
        if name not in expected:
            raise UserError(f"{source} has a tensor '{name}' that the config's model does not have; {way_out}")


def _plain(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


# ---- optimisers ------------------------------------------------------------------------------------------------------

def optimizer_tensors(optimizers: list[Optimizer]) -> Tensors:
    """`<parameter>.<slot>` -> tensor, for all optimisers."""
    tensors = {}
    for optimizer in optimizers:
        saved = optimizer.state_dict()
        names = _parameter_names(saved)
        for index, slots in saved["state"].items():
            tensors |= {f"{names[index]}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
    return tensors


def optimizer_groups(optimizers: list[Optimizer]) -> list[dict[str, Any]]:
    """Settings and parameter names of every group, as plain values for state.json."""
    groups = [group for optimizer in optimizers for group in optimizer.state_dict()["param_groups"]]
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def load_optimizers(optimizers: list[Optimizer], tensors: Tensors, source: Path) -> None:
    """Restore the result of `optimizer_tensors`; learning rates and the like come from the config."""
    slots: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition(".")
        slots.setdefault(name, {})[slot] = tensor.clone()  # a copy: aligned, and independent of the file
    for optimizer in optimizers:
        saved = optimizer.state_dict()
        _check_slots(optimizer, slots, source)
        state = {index: slots.pop(name) for index, name in _parameter_names(saved).items() if name in slots}
        optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    for name in slots:
        raise UserError(f"{source} has optimiser state for '{name}', which the config does not train; "
                        f"use the config.yaml of its own run")


def _check_slots(optimizer: Optimizer, slots: dict[str, Tensors], source: Path) -> None:
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for slot, tensor in slots.get(name, {}).items():
                if tensor.ndim and tensor.shape != parameter.shape:
                    raise UserError(f"{source}: '{name}.{slot}' has shape {tuple(tensor.shape)}, the parameter has "
                                    f"{tuple(parameter.shape)}; use the config.yaml of its own run")


def _parameter_names(saved: dict[str, Any]) -> dict[int, str]:
    return {index: name for group in saved["param_groups"]
            for index, name in zip(group["params"], group["param_names"], strict=True)}
