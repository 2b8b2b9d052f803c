"""The training loop: resumes bit for bit, counts its budget, splits its batch, and stops without harm."""

import inspect
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from same_runs import assert_same, figures, weights

from looped.config import dump_config, load_config
from looped.errors import UserError
from looped.models.build import build
from looped.objectives import Denoise, Loss, build_objective
from looped.rng import StepRandom
from looped.training import checkpoint as ckpt
from looped.training.heldout import heldout_figures
from looped.training.micro_batch import MicroBatches, clock_of
from looped.training.runs import load_run
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

VARIANTS = {
    "denoise": {"denoise.noise.distribution": "adaptive", "optim.ema_decay": 0.9},
    "truncated": {"objective": "truncated", "optim.name": "muon"},
    "blockwise": {"objective": "blockwise", "blocks.num": 2, "model.num_core_layers": 2, "optim.ema_decay": 0.9,
                  "training.accumulation": 2},
    "masked": {"objective": "masked", "blocks.num": 2, "model.num_core_layers": 2, "masked.cond_width": 8,
               "optim.ema_decay": 0.9, "training.accumulation": 2, "evaluation.levels": 4},
    "full-bf16": {"objective": "full", "training.precision": "bf16", "training.accumulation": 2, "optim.grad_clip": 0},
}


def signal_at(call, number=signal.SIGTERM):
    """A sample hook that sends a signal to this process at its `call`-th call; it is seen after the next step."""
    def send():
        os.kill(os.getpid(), number)

    return at_call(call, send)


def at_call(call, action):
    """A sample hook that does something at its `call`-th call."""
    calls = []

    def hook(objective, data, config):
        calls.append(1)
        if len(calls) == call:
            action()
        return "text"

    return hook


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_stopped_at_any_step_ends_like_one_that_was_not(tmp_path, tiny, name):
    config = tiny(**VARIANTS[name], **{"training.sample_every": 1, "training.eval_every": 3})
    train(config, tmp_path / "whole", sample=signal_at(0))
    stops = [train(config, tmp_path / "cut", sample=signal_at(call)) for call in (1, 2, 1)]
    assert [(stop.step, stop.exit_code) for stop in stops] == [(2, 143), (5, 143), (7, 143)]
    assert train(config, tmp_path / "cut", sample=signal_at(0)).exit_code == 0
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_two_seeds_differ(tmp_path, tiny):
    for seed in (0, 1):
        train(tiny(seed=seed), tmp_path / str(seed))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "0", tmp_path / "1")


def test_a_crash_loses_only_the_steps_after_the_checkpoint(tmp_path, tiny):
    config = tiny(**{"training.sample_every": 1, "training.checkpoint_every": 4})
    train(config, tmp_path / "whole", sample=signal_at(0))

    def crash():
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        train(config, tmp_path / "cut", sample=at_call(6, crash))
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # a line cut short
    assert len(ckpt.list_checkpoints(tmp_path / "cut")) == 1
    train(config, tmp_path / "cut", sample=signal_at(0))
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_has_nothing_to_do(tmp_path, tiny, capsys):
    train(tiny(), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert train(tiny(), tmp_path / "run").step == 8
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert "resuming from step 8" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_finish_the_step_save_and_tell_how_to_go_on(tmp_path, tiny, capsys, number, code):
    usual = signal.getsignal(number)
    result = train(tiny(**{"training.sample_every": 1}), tmp_path / "run", sample=signal_at(3, number))
    assert (result.exit_code, result.step) == (code, 4)  # sent after step 3, seen after step 4
    assert ckpt.list_checkpoints(tmp_path / "run")[0].name == "step-00000004"
    assert "stopped after step 4, which is saved; run the same command again to resume" in capsys.readouterr().out
    assert signal.getsignal(number) == usual


@pytest.mark.parametrize("objective", ["truncated", "denoise"])
def test_four_micro_batches_make_the_step_of_one(tmp_path, tiny, objective):
    config = {"objective": objective, "optim.lr": 1e-2, "training.batch_size": 8}
    runs = [train(tiny(**config, **{"training.accumulation": n}), tmp_path / str(n)) for n in (1, 4)]
    start = build_objective(tiny(**config), build(tiny(**config), runs[0].objective.model.vocab_size))
    for a, b, w in zip(*(run.objective.parameters() for run in runs), start.parameters(), strict=True):
        # Adam divides by the gradient's own size, so where that is nearly zero rounding shows.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert (a - b).norm() <= 1e-3 * (a - w).norm() + 1e-9  # small beside what training moved


def test_a_block_that_was_never_active_has_its_first_weights_and_no_optimiser_state(tmp_path, tiny):
    """Nor does it decay. Two steps are taken, so of three blocks one at least is never drawn."""
    config = tiny(objective="blockwise", **{"blocks.num": 3, "model.num_core_layers": 3, "optim.ema_decay": 0.5,
                                            "training.budget": 2})
    objective = build_objective(config, build(config, 270))
    drawn = {objective.sample_block(StepRandom(config.seed, step, count=1)) for step in range(2)}
    done = train(config, tmp_path / "run")
    saved = weights(tmp_path / "run")
    slots, averages = saved["optimizer"], saved["ema"]
    start = build(config, done.objective.model.vocab_size).recurrence.core.blocks
    for number, block in enumerate(done.objective.model.recurrence.core.blocks):
        rested, prefix = number not in drawn, f"denoiser.model.recurrence.core.blocks.{number}."
        assert rested != any(name.startswith(prefix) for name in slots)
        same = [torch.equal(weight, first) for weight, first in zip(block.parameters(), start[number].parameters(),
                                                                   strict=True)]
        assert all(same) == rested
        if rested:
            assert all(torch.equal(averages[prefix + name], weight) for name, weight in block.named_parameters())
    assert drawn != {0, 1, 2}


@pytest.mark.parametrize(("unit", "budget", "steps"), [("steps", 5, 5), ("tokens", 4 * 8 * 5, 5), ("tokens", 129, 5)])
def test_budgets_of_steps_and_tokens(tmp_path, tiny, unit, budget, steps):
    result = train(tiny(**{"training.budget_unit": unit, "training.budget": budget}), tmp_path / "run")
    assert result.step == steps


def test_a_budget_of_layer_forwards_counts_the_objectives_cost(tmp_path, tiny):
    config = tiny(objective="full", **{"training.budget_unit": "layer-forwards", "training.budget": 300})
    result = train(config, tmp_path / "run")
    each = 4 * result.objective.layer_forwards()  # 4 sequences of 3 (3 + 1 + 1) layer forwards
    assert each == 60
    assert result.step == 5


@pytest.mark.parametrize(("clock", "read"), [("wall", "perf_counter"), ("processor", "process_time")])
def test_a_budget_of_seconds_counts_training_alone_and_over_resumes(tmp_path, tiny, monkeypatch, clock, read):
    """On a clock that moves a sixteenth of a second whenever it is read, and by hours during an evaluation."""
    ticks = itertools.count()
    monkeypatch.setattr("looped.training.micro_batch.time", SimpleNamespace(**{read: lambda: next(ticks) / 16}))

    def slow(objective, data, config):
        for _ in range(100_000):
            next(ticks)
        return {"loss": 0.0}

    config = tiny(**{"training.budget_unit": "seconds", "training.budget": 2, "training.clock": clock,
                     "training.eval_every": 4, "training.sample_every": 1, "training.checkpoint_every": 0})
    train(config, tmp_path / "run", evaluate=slow, sample=signal_at(20))
    first = ckpt.check(ckpt.list_checkpoints(tmp_path / "run")[0])
    assert (first["step"], first["seconds"]) == (21, 21 / 16)  # the step after the signal
    assert train(config, tmp_path / "run", evaluate=slow, sample=lambda *_: "text").step == 32


def test_a_processors_time_is_refused_where_another_device_works():
    config = load_config(None, {"training.clock": "processor"})
    assert clock_of(config, torch.device("cpu")) is time.process_time
    with pytest.raises(UserError, match=r"does not measure work on cuda:0; set training.clock to wall"):
        clock_of(config, torch.device("cuda:0"))


def test_averaged_weights_are_what_is_evaluated_sampled_and_loaded(tmp_path, tiny):
    seen = {}

    def look(objective, data, config):
        assert not objective.training
        assert not torch.is_grad_enabled()
        seen.update({name: p.detach().clone() for name, p in objective.named_parameters()})
        return heldout_figures(objective, data, config)

    result = train(tiny(**{"optim.ema_decay": 0.9}), tmp_path / "run", evaluate=look)
    loaded = dict(load_run(tmp_path / "run").objective.named_parameters())
    plain = dict(result.objective.named_parameters())
    assert all(torch.equal(seen[name], loaded[name]) for name in seen)
    assert any(not torch.equal(seen[name], plain[name]) for name in seen)


def test_heldout_loss_is_the_same_at_every_call_and_learns_nothing(tmp_path, tiny):
    config = tiny(**{"denoise.noise.distribution": "adaptive"})
    train(config, tmp_path / "run")
    run = load_run(tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in run.objective.state_dict().items()}
    with torch.no_grad():
        first, second = (heldout_figures(run.objective, run.data, config) for _ in range(2))
    assert first == second
    assert all(torch.equal(before[name], tensor) for name, tensor in run.objective.state_dict().items())


def break_rows(monkeypatch, step, rows):
    """From `step` on, the loss of these rows is NaN."""
    usual = Denoise.forward

    def forward(self, tokens, random):
        loss = usual(self, tokens, random)
        hit = random.step >= step and any(random.start <= row < random.start + random.count for row in rows)
        return Loss(loss.value * float("nan"), loss.metrics) if hit else loss

    monkeypatch.setattr(Denoise, "forward", forward)


@pytest.mark.parametrize("rows", [(2,), (0, 1, 2, 3)])
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, tiny, monkeypatch, rows):
    config = tiny(**{"training.accumulation": 2})
    with monkeypatch.context() as patch:
        break_rows(patch, 5, rows)
        with pytest.raises(UserError) as caught:
            train(config, tmp_path / "run")
    message = str(caught.value)
    assert "the loss is nan at step 5 (row " + str(rows[0]) in message
    assert "train tokens" in message
    assert message.count("row ") == min(len(rows), 3)
    assert "last good checkpoint is" in message
    assert "step-00000004" in message
    assert [path.name for path in ckpt.list_checkpoints(tmp_path / "run")] == ["step-00000004", "step-00000002"]
    train(config, tmp_path / "run")  # the cause removed, the run goes on from good weights
    train(config, tmp_path / "whole")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path, tiny, monkeypatch):
    usual = Denoise.forward

    def forward(self, tokens, random):
        loss = usual(self, tokens, random)
        p = self.model.embed.weight
        spike = (p - p.detach()).abs().sum().sqrt() if random.step == 3 else 0.0  # 0, with an infinite slope
        return Loss(loss.value + spike, loss.metrics)

    monkeypatch.setattr(Denoise, "forward", forward)
    with pytest.raises(UserError, match=r"the gradient norm is nan at step 3 \(no single row\)"):
        train(tiny(), tmp_path / "run")
    assert ckpt.list_checkpoints(tmp_path / "run")[0].name == "step-00000002"


def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path, tiny, monkeypatch):
    calls = []

    def sometimes(tensors, path):
        calls.append(path)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return usual(tensors, path)

    usual = ckpt.save_file
    monkeypatch.setattr(ckpt, "save_file", sometimes)
    with pytest.raises(UserError, match="No space left on device; free space"):
        train(tiny(), tmp_path / "run")
    train(tiny(), tmp_path / "run")
    train(tiny(), tmp_path / "whole")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_damaged_newest_checkpoint_is_trained_again(tmp_path, tiny, capsys):
    train(tiny(), tmp_path / "whole")
    train(tiny(), tmp_path / "run")
    (tmp_path / "run" / "latest" / "model.safetensors").write_bytes(b"")
    train(tiny(), tmp_path / "run")
    assert "step-00000008 is damaged: model.safetensors" in capsys.readouterr().out
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_changed_text_is_refused(tmp_path, tiny):
    (tmp_path / "text").mkdir()
    for name in "abcd":
        (tmp_path / "text" / f"{name}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40 + name)
    config = tiny(**{"data.path": [str(tmp_path / "text")], "data.vocab_size": 260})
    train(config, tmp_path / "run")
    (tmp_path / "text" / "a.txt").write_text("another text of some length " * 60)
    with pytest.raises(UserError, match=r"have changed since .*; bring the old data back, or choose another --run"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(("batch", "accumulation", "processes", "size", "nums"), [
    (8, 1, 2, 4, [1, 1]), (8, 2, 2, 2, [2, 2]), (8, 1, 3, 2, [2, 1, 1]), (8, 1, 5, 1, [2, 2, 2, 1, 1]),
    (12, 2, 5, 1, [3, 3, 2, 2, 2])])
def test_every_sequence_of_a_step_is_one_process_s_whatever_their_number(tiny, batch, accumulation, processes, size,
                                                                         nums):
    config = tiny(**{"training.batch_size": batch, "training.accumulation": accumulation})
    parts = [MicroBatches.of(config, rank, processes) for rank in range(processes)]
    assert [part.num for part in parts] == nums
    assert {part.size for part in parts} == {size}
    assert [row for part in parts for micro in range(part.num) for row in part.rows(micro)] == list(range(batch))


def test_more_processes_than_sequences_are_refused(tiny):
    with pytest.raises(UserError, match=r"batch_size 4 does not split into 5 processes .* try 5"):
        MicroBatches.of(tiny(), 0, 5)


def test_the_result_is_a_bare_objective_even_after_bf16(tmp_path, tiny):
    objective = train(tiny(**{"training.precision": "bf16"}), tmp_path / "run").objective
    assert objective.forward.__func__ is inspect.unwrap(Denoise.forward)  # accelerate takes off the shape check too
    assert not objective.training


@pytest.mark.slow
@pytest.mark.parametrize(("injection", "warned"), [("add", True), ("linear", False)])
def test_a_run_whose_state_will_grow_with_depth_begins_with_a_warning(tmp_path, tiny, capsys, injection, warned):
    train(tiny(objective="full", **{"model.injection": injection, "training.budget": 1}), tmp_path)
    assert ("warning: with model.injection add" in capsys.readouterr().out) == warned
    assert ("warning: with model.injection add" in (tmp_path / "train.log").read_text()) == warned


@pytest.mark.slow
def test_a_compiled_step_trains_to_the_same_loss(tmp_path, tiny, unchecked):
    for flag in (False, True):
        train(tiny(objective="full", **{"training.compile": flag}), tmp_path / str(flag))
    plain, compiled = (figures(tmp_path / name)[-1]["loss"] for name in ("False", "True"))
    assert compiled == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
def test_random_kills_change_nothing(tmp_path, tiny):
    config = tiny(**{"training.budget": 300, "training.log_every": 7, "training.checkpoint_every": 5,
                     "optim.ema_decay": 0.9})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    script = Path(__file__).parents[2] / "scripts" / "kill_resume.py"
    command = [sys.executable, script, tmp_path / "config.yaml", "--kills", "6", "--work", tmp_path / "kills"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"identical": true' in done.stdout


@pytest.mark.parametrize("objective", ["truncated", "denoise"])
def test_samples_are_printed_by_depth(tmp_path, tiny, capsys, objective):
    train(tiny(objective=objective, **{"training.sample_every": 8, "evaluation.sample_depths": [1, 3],
                                       "evaluation.sample_length": 5}), tmp_path / "run")
    said = capsys.readouterr()
    text = said.out + said.err
    assert "depth 1, distinct-2" in text
    assert "depth 3, distinct-2" in text
