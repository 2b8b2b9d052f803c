"""Muon by owned matrices beside torch's, in the processes of a launcher.

Writes steps.json: for every set of matrices the largest difference from torch's Muon on whole ones, the exchanges of an
update, and the bytes that all processes send in it. Then trains the config of config.yaml, with the iteration in
float64: RUN-whole undisturbed, RUN-again stopped half-way and resumed.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import Muon

from looped.config import load_config
from looped.training.owned_muon import OwnedMuon
from looped.training.processes import _leave
from looped.training.train import open_trainer, train

SHAPES = [(8, 8), (32, 8), (8, 32), (24, 8), (9, 7), (1, 5)]
SETS = {"few": SHAPES, "many": SHAPES * 4, "one": [(5, 3)]}
plain = dist.all_to_all_single
sent = []


def counted(output, tensor, output_sizes, sizes, **kwargs):
    away = sum(size for process, size in enumerate(sizes) if process != dist.get_rank())
    sent.append(away * tensor.element_size())
    return plain(output, tensor, output_sizes, sizes, **kwargs)


def both(shapes, kind, updates):
    """(largest difference of any weight, collectives of the last update by name, bytes that all processes send in it)
    of a Muon on shards beside torch's on whole matrices; every third gradient is missing now and then."""
    mesh, gen = init_device_mesh("cpu", (dist.get_world_size(),)), torch.Generator().manual_seed(0)
    first = [torch.randn(shape, generator=gen) for shape in shapes]
    whole = [torch.nn.Parameter(tensor.clone()) for tensor in first]
    parts = [torch.nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)])) for tensor in first]
    reference, ours = (make(params, lr=0.02, weight_decay=0.1) for make, params in ((Muon, whole), (kind, parts)))
    for update in range(updates):
        for each, (full, part) in enumerate(zip(whole, parts, strict=True)):
            gradient = torch.randn(full.shape, generator=gen)
            missing = update % 3 == 2 and each % 3 == 0
            full.grad = None if missing else gradient
            part.grad = None if missing else distribute_tensor(gradient, mesh, [Shard(0)])
        reference.step()
        sent.clear()
        with CommDebugMode() as seen:
            ours.step()
    total = torch.tensor(sum(sent))
    dist.all_reduce(total)
    return (max((part.full_tensor() - full).abs().max().item() for part, full in zip(parts, whole, strict=True)),
            {str(name).rpartition(".")[2]: num for name, num in seen.get_comm_counts().items()}, total.item())


def main(folder):
    PartialState(cpu=True)  # the group that a trainer finds
    dist.all_to_all_single = counted
    found = {name: both(shapes, OwnedMuon, 20) for name, shapes in SETS.items()}
    found["torch"] = both(SHAPES[:-1], Muon, 2)  # it raises for a matrix of one row
    if dist.get_rank() == 0:
        (folder / "steps.json").write_text(json.dumps(found), encoding="utf-8")
    if (folder / "config.yaml").exists():
        train_twice(load_config(folder / "config.yaml"), folder)
    _leave()


def train_twice(config, folder):
    with patch.object(torch.Tensor, "bfloat16", torch.Tensor.double), patch.object(OwnedMuon, "travels", torch.float64):
        train(config, folder / "whole", quiet=True)
        with open_trainer(config, folder / "again", quiet=True) as trainer:
            for _ in range(config.training.budget // 2):
                trainer.step()
        train(config, folder / "again", quiet=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
