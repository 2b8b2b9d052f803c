"""Muon on shards (`looped.training.owned_muon`): the update of torch to the last bit, by two exchanges."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from owned_runs import SETS, SHAPES
from same_runs import weights
from torch.optim import _muon
from torch.utils.flop_counter import FlopCounterMode

from looped.config import dump_config
from looped.training.owned_muon import OwnedMuon, iteration_flops, matrices_by_owner
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")


def run_in(folder, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               Path(__file__).parent / "owned_runs.py", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "steps.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def by_two(tiny, tmp_path_factory):
    """(config of a run, its folder, what the optimisers did) of two processes."""
    folder = tmp_path_factory.mktemp("owned")
    config = tiny(**{"objective": "full", "optim.name": "muon", "training.shard": "fsdp", "training.budget": 20,
                     "training.batch_size": 8})
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return config, folder, run_in(folder, 2)


def check_steps(steps, processes):
    for name, shapes in SETS.items():
        difference, collectives, sent = steps[name]
        assert difference == 0
        assert collectives == {"alltoall_base_": 2}
        assert sent == bytes_between(shapes, processes)
    difference, collectives, _ = steps["torch"]  # on the same parts: exchanges for each product, other roundings
    assert sum(collectives.values()) > 10 * len(SHAPES)
    assert difference > 0


def bytes_between(shapes, processes):
    """Bytes in bf16 of every part that is not its owner's, there and back; shards are those of torch.chunk."""
    total = 0
    for owner, matrices in enumerate(matrices_by_owner([torch.Size(shape) for shape in shapes], processes)):
        for each in matrices:
            parts = torch.empty(shapes[each]).chunk(processes)
            total += 2 * 2 * sum(part.numel() for process, part in enumerate(parts) if process != owner)
    return total


def test_two_exchanges_make_the_update_of_torch_bit_for_bit(by_two):
    check_steps(by_two[2], 2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 5])
def test_so_they_do_over_more_processes_than_a_matrix_has_rows(tmp_path, processes):
    check_steps(run_in(tmp_path, processes), processes)


def check_near(run, other, atol):
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for file, tensors in ours.items():
        assert tensors.keys() == theirs[file].keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, theirs[file][name], rtol=0, atol=atol,
                                       msg=lambda said, name=name: f"{name}: {said}")


def test_a_run_on_shards_has_the_weights_and_the_state_of_one_process(by_two, tmp_path):
    """In float64, since an iteration in bf16 makes the order of sums in a gradient visible."""
    config, folder, _ = by_two
    with patch.object(torch.Tensor, "bfloat16", torch.Tensor.double):
        train(config.replace(**{"training.shard": "none"}), tmp_path / "one", quiet=True)
    check_near(folder / "whole", tmp_path / "one", atol=1e-6)


def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(by_two):
    _, folder, _ = by_two
    check_near(folder / "again", folder / "whole", atol=0)


def test_the_iteration_of_torch_works_in_the_format_that_travels():
    """So that nothing is lost if matrices are sent in it."""
    matrix = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    made, rounded = (_muon._zeropower_via_newtonschulz(each, (3.4445, -4.775, 2.0315), 5, 1e-7)
                     for each in (matrix, matrix.to(OwnedMuon.travels)))
    assert made.dtype == OwnedMuon.travels
    assert torch.equal(made, rounded)


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
def test_the_cost_of_an_iteration_is_what_torch_counts(shape):
    with FlopCounterMode(display=False) as counted:
        _muon._zeropower_via_newtonschulz(torch.ones(shape), (3.4445, -4.775, 2.0315), 5, 1e-7)
    assert counted.get_total_flops() == 5 * iteration_flops(torch.Size(shape))


def test_owners_have_equal_work_up_to_one_matrix():
    shapes = [torch.Size((64 + each % 7 * 16, 64 + each % 5 * 48)) for each in range(50)]
    owned = matrices_by_owner(shapes, 4)
    assert sorted(each for matrices in owned for each in matrices) == list(range(50))
    work = [sum(iteration_flops(shapes[each]) for each in matrices) for matrices in owned]
    assert max(work) - min(work) <= min(map(iteration_flops, shapes))
