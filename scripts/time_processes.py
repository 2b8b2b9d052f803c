"""Time the update of Muon on shards, or the validation of a config, in processes on a CPU.

    torchrun --standalone --nproc-per-node 2 scripts/time_processes.py owned --width 256
    torchrun --standalone --nproc-per-node 2 scripts/time_processes.py validation --config configs/smoke.yaml

One line of JSON: the median seconds of `--times` times, after one that does not count, and those of the first process's
CPU. owned, torch, adamw: an update of 25 matrices of five shapes. validation: the held-out figures that training
writes, by as many processes, or by one without a launcher. For a comparison call it for each arm in turn, several
times: other programs disturb all alike then.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import AdamW, Muon

from looped.config import load_config
from looped.training.owned_muon import OwnedMuon
from looped.training.train import open_trainer

UPDATES = {"owned": OwnedMuon, "torch": Muon, "adamw": AdamW}


def seconds_of(act: Callable[[], Any], num: int) -> dict[str, float]:
    """Median seconds of a call, in which all processes begin together; the first does not count."""
    found = []
    for _ in range(num + 1):
        if dist.is_initialized():
            dist.barrier()
        start, worked = time.perf_counter(), time.process_time()
        act()
        found.append((time.perf_counter() - start, time.process_time() - worked))
    wall, work = (statistics.median(each) for each in zip(*found[1:], strict=True))
    return {"seconds": wall, "cpu_seconds": work}


def update(kind: str, width: int, num: int) -> dict[str, Any]:
    """Seconds of an update, and its exchanges."""
    PartialState(cpu=True)
    mesh, gen = init_device_mesh("cpu", (dist.get_world_size(),)), torch.Generator().manual_seed(0)
    shapes = [(width, width), (4 * width, width), (width, 4 * width), (3 * width, width), (width, 2 * width)] * 5
    params = [torch.nn.Parameter(distribute_tensor(torch.randn(shape, generator=gen), mesh, [Shard(0)]))
              for shape in shapes]
    for param in params:
        param.grad = distribute_tensor(torch.randn(param.shape, generator=gen), mesh, [Shard(0)])
    optimizer = UPDATES[kind](params, lr=1e-3)
    seconds = seconds_of(optimizer.step, num)
    with CommDebugMode() as seen:
        optimizer.step()
    return seconds | {"exchanges": seen.get_total_counts()}


def validation(config: str, flags: dict[str, str], num: int) -> dict[str, Any]:
    """Seconds of a validation, before the first step."""
    with tempfile.TemporaryDirectory() as folder, open_trainer(
            load_config(config, flags | {"training.budget": "1"}), shared(folder), quiet=True) as trainer:
        return seconds_of(trainer.evaluate, num)


def shared(folder: str) -> str:
    """The first process's folder."""
    state, found = PartialState(cpu=True), [folder]
    if state.num_processes > 1:
        dist.broadcast_object_list(found)
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*UPDATES, "validation"])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--config", default="configs/smoke.yaml")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the config")
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = validation(args.config, dict(each.split("=", 1) for each in args.set), args.times) \
        if args.what == "validation" else update(args.what, args.width, args.times)
    state = PartialState(cpu=True)
    if state.is_main_process:
        print(json.dumps({"what": args.what, "processes": state.num_processes} | found))


if __name__ == "__main__":
    main()
