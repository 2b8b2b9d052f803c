"""Runs with settings between loop steps: resumed bit for bit, started from runs without them, evaluated and sampled."""

import pytest
import torch

from looped import evaluate_depth, generate, load_run
from looped.training import checkpoint as ckpt
from looped.training.train import open_trainer, train

pytestmark = pytest.mark.usefixtures("unchecked")

BETWEEN = {"model.step_embedding": "modulate", "model.loop_scale": "update", "model.streams": 2,
           "model.stream_mixing": "dynamic"}
LOOP = {"objective": "truncated", "recurrence.mean": 3, "recurrence.backprop": 2, "training.budget": 6,
        "training.checkpoint_every": 2, "training.keep_checkpoints": 9, "optim.lr": 0.01}


def weights(run, step):
    return ckpt.load_tensors(ckpt.checkpoint_path(run, step), "model")


def test_a_run_that_is_resumed_is_the_undisturbed_one_and_runs_at_any_depth(tiny, tmp_path):
    config = tiny(**LOOP | BETWEEN)
    train(config, tmp_path / "whole", quiet=True)
    with open_trainer(config, tmp_path / "halves", quiet=True) as trainer:
        for _ in range(3):
            trainer.step()
        trainer.save()
    train(config, tmp_path / "halves", quiet=True)
    one, other = (weights(tmp_path / name, 6) for name in ("whole", "halves"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    assert any(".boundary." in name for name in one)
    run = load_run(tmp_path / "halves")
    tokens = run.data.heldout.sequences(2, config.data.length)
    sweep = evaluate_depth(run.objective, tokens, depths=[1, 64], bytes_per_token=1.0).means("nats_per_token")
    assert all(0 < loss < 20 for loss in sweep.values())
    assert generate(run.objective, tokens[:, :3], depth=5, num_tokens=4).shape == (2, 4)


@pytest.mark.parametrize("objective", ["ar", "truncated"])
def test_a_run_without_them_is_a_start_for_one_with_them(objective, tiny, tmp_path):
    train(tiny(**LOOP | {"objective": objective}), tmp_path / "plain", quiet=True)
    frozen = {"training.warm_start": str(tmp_path / "plain"), "optim.lr": 1e-30, "optim.weight_decay": 0}
    warm = train(tiny(**LOOP | BETWEEN | frozen | {"training.budget": 2}), tmp_path / "warm", quiet=True)
    theirs, ours = weights(tmp_path / "plain", 6), warm.objective.state_dict()
    kept = {name for name in ours if name in theirs and torch.equal(ours[name], theirs[name])}
    assert kept == set(theirs)
    assert {name.split(".")[2] for name in set(ours) - kept} <= {"boundary", "core"}
