"""`training.shard fsdp`: two processes that share a model make the weights of one, and send them once per step."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from same_runs import weights

from looped.config import dump_config
from looped.cost.plan import plan
from looped.errors import UserError
from looped.training import checkpoint as ckpt
from looped.training.runs import load_run
from looped.training.train import open_trainer, train

pytestmark = pytest.mark.usefixtures("unchecked")

BLOCKS = {"blocks.num": 2, "model.num_core_layers": 2}
RULES = {
    "full": {"objective": "full", "optim.ema_decay": 0.9},
    "denoise": {"denoise.context": "context", "denoise.noise.distribution": "adaptive", "training.accumulation": 2,
                "optim.ema_decay": 0.9},
    "truncated": {"objective": "truncated"}, "ar": {"objective": "ar"}, "inject": {"denoise.context": "inject"},
    "concat": {"denoise.context": "concat"}, "blockwise": {"objective": "blockwise"} | BLOCKS,
    "masked": {"objective": "masked", "model.state_init": "zero"}, "one-step": {"objective": "one-step"},
    "fixed-point": {"objective": "fixed-point"}, "progressive": {"objective": "progressive"},
    "gate": {"objective": "full", "model.exit_gate": True},
    "two trained steps": {"denoise.train_steps": 2, "denoise.carry": "latent"},
    "checkpointed": {"objective": "full", "training.checkpoint_activations": True},
    "no layers around the loop": {"objective": "full", "model.num_prelude_layers": 0, "model.num_coda_layers": 0},
    "untied": {"objective": "full", "model.tie_embeddings": False},
    "Muon": {"objective": "full", "optim.name": "muon"},
}
LOOSE = {"fixed-point": 1e-4, "Muon": 5e-3}
"""Differences that are allowed: its solver ends by a residual; Muon orthogonalises in bf16."""
FAST = ("full", "denoise")
DEPTHS = {f"depth {depth}": {"objective": "full", "recurrence.mean": depth, "training.budget": 2}
          for depth in (6, 24, 96)}


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """`trained(rules, stops)`: (configs, folder, all-gathers and bytes of each step) of sharded runs."""
    def go(rules, stops=()):
        folder = tmp_path_factory.mktemp("sharded")
        configs = {name: tiny(**{"training.batch_size": 8, "training.shard": "fsdp"} | changes)
                   for name, changes in rules.items()}
        (folder / "configs.json").write_text(json.dumps(
            {name: (yaml.safe_load(dump_config(config)), name in stops) for name, config in configs.items()}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                   Path(__file__).parent / "sharded_runs.py", folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=550,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-6000:]
        return configs, folder, json.loads((folder / "counts.json").read_text())

    return go


@pytest.fixture(scope="module")
def fast(trained):
    return trained({name: RULES[name] for name in FAST} | DEPTHS, stops=FAST)


def check_same(ours, theirs, rtol=1e-4, atol=2e-6):
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    for file, tensors in ours.items():
        assert tensors.keys() == theirs[file].keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, theirs[file][name], rtol=rtol, atol=atol,
                                       msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("name", FAST)
def test_weights_averages_and_moments_are_those_of_one_process(fast, tmp_path, name):
    configs, folder, _ = fast
    train(configs[name].replace(**{"training.shard": "none"}), tmp_path / "one", quiet=True)
    check_same(folder / f"{name}-whole", tmp_path / "one")


@pytest.mark.slow
def test_so_they_are_under_every_other_rule(trained, tmp_path):
    rules = {name: changes for name, changes in RULES.items() if name not in FAST}
    configs, folder, _ = trained(rules)
    for name in rules:
        train(configs[name].replace(**{"training.shard": "none"}), tmp_path / name, quiet=True)
        check_same(folder / f"{name}-whole", tmp_path / name, atol=LOOSE.get(name, 2e-6))


@pytest.mark.parametrize("name", FAST)
def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(fast, name):
    _, folder, _ = fast
    check_same(folder / f"{name}-again", folder / f"{name}-whole", rtol=0, atol=0)


def test_one_process_goes_on_where_two_have_stopped(fast, tmp_path):
    """The checkpoint is whole: it knows nothing of shards."""
    configs, folder, _ = fast
    run = folder / "full-again"
    for newer in sorted((run / "checkpoints").glob("step-*"))[1:]:
        newer.rename(tmp_path / newer.name)
    train(configs["full"].replace(**{"training.shard": "none"}), run, quiet=True)
    check_same(run, folder / "full-whole")


def test_each_process_writes_its_parts_and_their_hash(fast):
    _, folder, _ = fast
    newest = ckpt.list_checkpoints(folder / "full-whole")[0]
    state = ckpt.check(newest)
    assert state["format"] == 2
    assert sorted(state["sha256"]) == sorted(
        f"{part}/shard-0000{rank}-model-00001-of-00001.safetensors"
        for part in ("model", "ema", "optimizer") for rank in (1, 2))
    rows = [load_file(newest / "model" / f"shard-0000{rank}-model-00001-of-00001.safetensors")[
        "model.prelude.0.attn.q.weight"].shape[0] for rank in (1, 2)]
    whole = ckpt.load_tensors(newest, "model")["model.prelude.0.attn.q.weight"].shape[0]
    assert rows == [whole / 2, whole / 2]


def test_a_damaged_shard_is_seen(fast, tmp_path):
    _, folder, _ = fast
    shutil.copytree(folder / "full-whole", tmp_path / "run", symlinks=True)
    shard = sorted(ckpt.list_checkpoints(tmp_path / "run")[0].glob("ema/*"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"ema/{shard.name} does not match its recorded hash"):
        ckpt.newest_good(tmp_path / "run", lambda line: None)


def test_a_sharded_run_is_loaded_and_evaluated_as_any_other(fast, tmp_path):
    _, folder, _ = fast
    averaged, plain = (load_run(folder / "full-whole", ema=ema).objective for ema in (True, False))
    for objective, part in ((averaged, "ema"), (plain, "model")):
        saved = ckpt.load_tensors(ckpt.list_checkpoints(folder / "full-whole")[0], part)
        assert all(torch.equal(tensor, saved[name]) for name, tensor in ckpt.module_tensors(objective).items())


def launch(num, *arguments):
    """Run shards_again.py in `num` processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num),
               Path(__file__).parent / "shards_again.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "denoise", "blockwise", "Muon"])
def test_one_two_and_four_processes_go_on_from_each_other(tiny, tmp_path, name):
    config = tiny(**{"training.batch_size": 8, "training.budget": 12} | RULES[name])
    train(config, tmp_path / "one", quiet=True)
    with open_trainer(config, tmp_path / "run", quiet=True) as trainer:
        for _ in range(4):
            trainer.step()
    (tmp_path / "run.yaml").write_text(dump_config(config.replace(**{"training.shard": "fsdp"})))
    for num in (2, 4):
        done = launch(num, tmp_path / "run", 4)
        assert done.returncode == 0, done.stderr[-3000:]
    newest = ckpt.list_checkpoints(tmp_path / "run")[0]
    assert len(list((newest / "model").iterdir())) == 4
    check_same(tmp_path / "run", tmp_path / "one", atol=LOOSE.get(name, 2e-6))


@pytest.mark.slow
def test_a_full_disk_of_one_process_is_one_sentence_of_all(tiny, tmp_path):
    config = tiny(**{"training.batch_size": 8, "training.shard": "fsdp", "training.budget": 100,
                     "training.checkpoint_every": 4, "training.num_evals": 0, "training.log_every": 100})
    (tmp_path / "run.yaml").write_text(dump_config(config))
    done = launch(2, tmp_path / "run", 100, 1000)
    said = [line for line in done.stdout.splitlines() if line.startswith("said: ")]
    assert len(said) == 2, done.stderr[-3000:]
    for line in said:
        assert re.search(r"cannot write checkpoint .*step-00000004: rank 1: .*[Tt]oo large.*from the start", line)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_weights_are_sent_once_per_step_however_deep_the_loop(fast):
    _, _, counts = fast
    steps = [step for name in DEPTHS for step in counts[name]]
    assert len(steps) == 6
    assert len({tuple(step) for step in steps}) == 1
    assert steps[0][0] == 4  # one layer before the loop, the loop, one after it, and the rest
    assert [step[0] for step in counts["denoise"]] == [4] * 8  # of two micro-batches as well


@pytest.mark.parametrize("name", FAST)
def test_a_plan_has_the_bytes_that_are_gathered(fast, name):
    """`looped plan`, within 5 %; tests/training/test_plan_measured.py has all its figures."""
    configs, _, counts = fast
    assert counts[name][0][1] == pytest.approx(plan(configs[name], 270, devices=2).gathered, rel=0.05)


def test_what_does_not_go_with_shards_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match=r"there is one; start it with torchrun, or set training\.shard to none"):
        train(tiny(**{"training.shard": "fsdp"}), tmp_path / "run", quiet=True)
