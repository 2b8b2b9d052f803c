"""The training loop: one optimiser step after another until the budget is used, resumable at any of them.

All randomness and the order of the data are functions of (seed, step), so a checkpoint holds weights, optimiser state
and counters, and the same command run again goes on bit for bit. The exception is a budget in seconds: its learning
rate and its end depend on the clock.
"""

import math
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looped.config import Config
from looped.data.batch import Batch
from looped.data.labelled import SoughtImages
from looped.data.opening import Data, Seen, find_data, located
from looped.domains import domain_of
from looped.errors import UserError
from looped.evaluation.depth import peak_bytes
from looped.evaluation.image_samples import write_picture
from looped.models.build import build
from looped.nn.checks import require
from looped.notices import noted
from looped.objectives import Loss, Objective, build_objective
from looped.objectives.state_norm import cautions
from looped.rng import StepRandom
from looped.training import checkpoint as ckpt
from looped.training.counters import Counters
from looped.training.edges import with_measured_edges
from looped.training.heldout import heldout_figures, heldout_samples
from looped.training.identity import recall_data, remember_data
from looped.training.monitor import LOG, Meter, Monitor, append
from looped.training.optim import EMA, build_optimizers, lr_factor, set_lr
from looped.training.parts import take_shared
from looped.training.processes import catch_signals, every_process, first_process, start_accelerator
from looped.training.runs import load_run, open_run, own_tokenizer, save_tokenizer, started_in
from looped.training.warm_start import check_source, take_over

AGAIN = "bring the old data back, or choose another --run"
"""The way out where a run that goes on meets other data."""

Evaluate = Callable[[Objective, Data, Config], dict[str, float]]
Sample = Callable[[Objective, Data, Config], str | np.ndarray]


@dataclass(frozen=True)
class Result:
    """The end of training: `step` optimiser steps are done and saved; `signal` is what stopped it early, if any did."""

    run_dir: Path
    step: int
    objective: Objective
    signal: int = 0

    @property
    def exit_code(self) -> int:
        """0, or by shell custom 128 + the signal: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signal if self.signal else 0


def train(config: Config, run_dir: str | Path, *, evaluate: Evaluate | None = None, sample: Sample | None = None,
          data: Data | None = None) -> Result:
    """Train `config` in the folder `run_dir`, or go on where its newest whole checkpoint stands.

    evaluate: (objective, data, config) -> figures to log every `training.eval_every` steps, `training.num_evals` times
    over the budget, and at the end; when None the losses on held-out text, how many problems of a task are solved, or
    the accuracy on images or the loss of making them. sample: likewise -> text to print, or a picture to keep in
    samples/, every `training.sample_every` steps; when None continuations of held-out text at
    `evaluation.sample_depths`, a problem with its answer, classes with their names, or images. Both see averaged
    weights where there are some. data: None prepares what the config names.

    The first SIGTERM or Ctrl-C finishes the step, saves and returns; a second one stops at once. Raises UserError for
    no config, a run in use, a config that does not fit, damaged checkpoints, a full disk, or a loss that is not finite.
    """
    require(config, Config, "config", "load one with looped.load_config(path)")
    pilot, config = config.blocks.edges_from, with_measured_edges(config)
    accelerator = start_accelerator(config)
    with ExitStack() as stack:
        run_dir = Path(run_dir)
        run = open_run(config, run_dir, device=str(accelerator.device))
        first_process(accelerator, lambda: stack.enter_context(run))
        if accelerator.is_main_process:
            stack.enter_context(noted(lambda line: append(run_dir / LOG, line + "\n")))
        given = data is not None
        if data is None:
            data = every_process(accelerator, lambda: find_data(located(config, started_in(run_dir))).open(
                Seen(own_tokenizer(run_dir))))
        if pilot is not None and not config.training.other_data:
            every_process(accelerator, lambda: check_source("blocks.edges_from", pilot, data))
        monitor = stack.enter_context(Monitor(run_dir, config, main=accelerator.is_main_process))
        caught = stack.enter_context(catch_signals())
        trainer = Trainer(config, run_dir, data, accelerator, monitor)
        if data.tokenizer is not None:
            first_process(accelerator, lambda: save_tokenizer(run_dir, data.tokenizer))
        first_process(accelerator, lambda: remember_data(run_dir, data, given=given))
        trainer.say_hello()
        stop = 0
        while trainer.fraction < 1 and not stop:
            before = trainer.fraction
            trainer.train_step()
            stop = trainer.agree(caught.number)
            step, finished = trainer.done.step, trainer.fraction >= 1
            passed = math.floor(trainer.fraction * config.training.num_evals) > math.floor(
                before * config.training.num_evals)
            if finished or step % config.training.log_every == 0:
                trainer.log()
            if finished or passed or _due(step, config.training.eval_every):
                trainer.evaluate(evaluate or heldout_figures)
            if _due(step, config.training.sample_every):
                trainer.sample(sample or heldout_samples)
            if finished or stop or _due(step, config.training.checkpoint_every):
                trainer.save()
        trainer.say_goodbye(stop)
        return Result(run_dir, trainer.done.step, trainer.unwrap(), stop if trainer.fraction < 1 else 0)


class Trainer:
    """The pieces of a run and what is done with them; `train` says when."""

    def __init__(self, config: Config, run_dir: Path, data: Data, accelerator: Any, monitor: Monitor):
        self.config = config
        self.run_dir = run_dir
        self.data = data
        self.accelerator: Any = accelerator
        self.monitor = monitor
        self.micro_batch: int = micro_batch_size(config, accelerator.num_processes)
        self.objective: Objective = build_objective(
            config, build(config, data.vocab_size, data.picture), data.end_of_text)
        self.objective.to(accelerator.device).train()
        if config.training.warm_start and not ckpt.list_checkpoints(run_dir):
            every_process(accelerator, lambda: self.warm_start(config.training.warm_start))
        if config.blocks.shared_from and not ckpt.list_checkpoints(run_dir):
            every_process(accelerator, lambda: take_shared(self.objective, config, data.fingerprint))
        self.optimizers: list[torch.optim.Optimizer] = build_optimizers(self.objective, config.optim)
        self.ema: EMA | None = EMA(self.objective, config.optim.ema_decay) if config.optim.ema_decay else None
        self.done: Counters = Counters()
        self.meter: Meter = Meter()
        self.seen: int = 0
        self.clock: Callable[[], float] = clock_of(config, accelerator.device)
        self.restore()
        self.saved: int = self.done.step
        self.logged: Counters = replace(self.done)
        if config.training.compile:
            self.objective.model.compile_step()
        self.module: Any = accelerator.prepare_model(self.objective)

    @property
    def fraction(self) -> float:
        """The share of the budget that is spent."""
        return self.done.fraction(self.config.training)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def train_step(self) -> None:
        """Forward and backward over the micro-batches, the checks, then the update."""
        start = self.clock()
        set_lr(self.optimizers, lr_factor(self.fraction, self.done.step, self.config.optim))
        losses = [self.backward(micro) for micro in range(self.config.training.accumulation)]
        self.check(losses, self.clip())
        for optimizer in self.optimizers:
            optimizer.step()
        if self.ema is not None:  # while it can be seen what had a gradient
            self.ema.update(self.objective, self.done.step)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.objective.after_step()
        self.count(self.clock() - start)

    def rows(self, micro: int) -> range:
        """The rows of the optimiser step that this process takes in a micro-batch."""
        index = self.accelerator.process_index * self.config.training.accumulation + micro
        return range(index * self.micro_batch, (index + 1) * self.micro_batch)

    def inputs(self, rows: range) -> tuple[Tensor | Batch | SoughtImages, StepRandom]:
        """Tokens (or problems) and randomness of some rows of the present step."""
        c, device = self.config, self.accelerator.device
        tokens = self.data.train.batch(self.done.step, rows=rows, **self.batch_settings())
        return tokens.to(device), StepRandom(c.seed, self.done.step, start=rows.start, count=len(rows),
                                             total=c.training.batch_size, device=device)

    def batch_settings(self) -> dict[str, int]:
        """What the order of the data depends on, besides the step."""
        c = self.config
        return {"batch_size": c.training.batch_size, "seed": c.seed, **domain_of(c).order(c)}

    def backward(self, micro: int) -> Loss:
        """Add a micro-batch's gradients; processes exchange them after the last one only."""
        num = self.config.training.accumulation
        with self.accelerator.no_sync(self.module) if micro < num - 1 else nullcontext():
            data, random = self.inputs(self.rows(micro))
            loss = self.module(data, random)
            self.accelerator.backward(loss.value / num)
        self.seen += (Batch.of(data) if isinstance(data, Tensor) else data).num_tokens
        return Loss(loss.value.detach(), loss.metrics)

    def clip(self) -> Tensor:
        """Clip the gradient, and give its norm before that."""
        return self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.optim.grad_clip or math.inf)

    def check(self, losses: list[Loss], norm: Tensor) -> None:
        """Stop before the update where the loss or the gradient is not finite; take down the figures otherwise."""
        loss = self.accelerator.reduce(torch.stack([loss.value for loss in losses]).mean(), "mean").item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self.non_finite(loss, float(norm))
        for metrics in (loss.metrics for loss in losses):
            self.meter.add({name: float(value) for name, value in metrics.items() if name != "loss"})
        self.meter.add({"loss": loss, "grad_norm": float(norm)})

    def count(self, seconds: float) -> None:
        """One more step is done."""
        training, done = self.config.training, self.done
        done.step += 1
        done.tokens += self.all_seen()
        done.layer_forwards += training.batch_size * self.objective.layer_forwards()
        done.seconds += seconds

    def all_seen(self) -> int:
        """Tokens of this step, over all processes."""
        seen, self.seen = self.seen, 0
        if self.accelerator.num_processes == 1:
            return seen
        return int(self.accelerator.reduce(torch.tensor(seen, device=self.accelerator.device), "sum"))

    def agree(self, number: int) -> int:
        """The signal that any process has caught (0: none); their clocks are brought to one time."""
        if self.accelerator.num_processes == 1:
            return number
        own = [[round(self.done.seconds * 1e9), number]]  # whole nanoseconds: a device may have no float64
        everyone = self.accelerator.gather(torch.tensor(own, device=self.accelerator.device)).cpu()
        self.done.seconds = everyone[:, 0].double().mean().item() / 1e9
        return int(everyone[:, 1].max())

    def non_finite(self, loss: float, norm: float) -> UserError:
        """The report of a step that must not be taken."""
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        bad = self.gather(self.bad_rows())
        named = [self.data.train.describe(self.done.step, rows=range(row, row + 1), **self.batch_settings())[0]
                 for row in bad[:3]]
        where = "; ".join(named) + (f" and {len(bad) - 3} more rows" if len(bad) > 3 else "")
        good = ckpt.list_checkpoints(self.run_dir)
        return UserError(f"{what} at step {self.done.step} ({where or 'no single row'}); nothing was updated or saved, "
                         f"and the last good checkpoint is {good[0] if good else 'not yet there'}; "
                         f"try a lower optim.lr or optim.grad_clip in a new --run")

    @torch.no_grad()
    def bad_rows(self) -> list[int]:
        """Rows of this process whose loss, alone, is not finite: randomness goes by row, so each can be done again."""
        self.objective.eval()
        rows = [row for micro in range(self.config.training.accumulation) for row in self.rows(micro)]
        return [row for row in rows if not self.objective(*self.inputs(range(row, row + 1))).value.isfinite()]

    # ---- reports -----------------------------------------------------------------------------------------------------

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, joined."""
        if self.accelerator.num_processes == 1:
            return values
        from accelerate.utils import gather_object

        return gather_object(values)

    def joint_meter(self) -> Meter:
        """The figures of all processes."""
        meter = Meter()
        meter.merge(self.gather([self.meter.sums]))
        return meter

    def log(self) -> None:
        """A line with the means since the last one."""
        done, last = self.done, self.logged
        rate = (done.tokens - last.tokens) / max(done.seconds - last.seconds, 1e-9)
        values = self.joint_meter().means() | {"lr": self.optimizers[0].param_groups[0]["lr"]} | asdict(done)
        values |= {"tokens_per_second": rate, "peak_bytes": peak_bytes()}
        self.monitor.metrics("train", values.pop("step"), values)
        self.monitor.progress(done.step, self.fraction, values)
        self.meter, self.logged = Meter(), replace(done)

    def evaluate(self, evaluate: Evaluate) -> None:
        """Figures of the (averaged) weights, by the first process."""
        values = self.on_eval(lambda objective: evaluate(objective, self.data, self.config))
        if values is not None:
            counts = asdict(self.done)
            self.monitor.metrics("heldout", counts.pop("step"), counts | values)
            self.monitor.say(f"step {self.done.step}  held-out  "
                             + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def sample(self, sample: Sample) -> None:
        """Text or a picture by the (averaged) weights, by the first process."""
        made = self.on_eval(lambda objective: sample(objective, self.data, self.config))
        if made is not None:
            shown = made if isinstance(made, str) else self.keep_picture(made)
            self.monitor.say(f"step {self.done.step}  sample\n{shown}")

    def keep_picture(self, pixels: np.ndarray) -> Path:
        """Where a sample that is a picture now is."""
        path = self.run_dir / "samples" / f"step-{self.done.step:08d}.png"
        write_picture(pixels, path)
        return path

    def on_eval(self, work: Callable[[Objective], Any]) -> Any:
        """`work(objective)` on the first process, in evaluation mode and with averaged weights."""
        averaged = self.ema.applied(self.objective) if self.ema is not None else nullcontext()
        self.objective.eval()
        with averaged, self.accelerator.autocast(), torch.no_grad():
            value = first_process(self.accelerator, lambda: work(self.objective))
        self.objective.train()
        return value

    def say_hello(self) -> None:
        """What is trained, on what, from where."""
        num, processes = sum(p.numel() for p in self.objective.parameters()), self.accelerator.num_processes
        self.monitor.say(self.data.summary)
        self.monitor.say(f"{self.config.objective}: {num:,} parameters, {processes} process{'es' * (processes > 1)} on "
                         f"{self.accelerator.device}, {self.config.training.precision}"
                         + (f"; going on from step {self.done.step}" if self.done.step else ""))
        for caution in cautions(self.config):
            self.monitor.say(f"warning: {caution}")

    def say_goodbye(self, stop: int) -> None:
        """The last lines: how it ended, and how to go on."""
        done = self.done
        if self.fraction < 1:
            self.monitor.say(f"{signal.Signals(stop).name}: stopped after step {done.step}, which is saved; "
                             f"run the same command again to go on")
        else:
            self.monitor.say(f"done: {done.step} steps, {done.tokens:,} tokens, {done.seconds:.1f} s of training; "
                             f"the run is {self.run_dir}")

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of this step, by the first process."""
        meter = self.joint_meter().sums
        if self.saved != self.done.step:
            first_process(self.accelerator, lambda: self._write(meter))
            self.saved = self.done.step

    def _write(self, meter: dict) -> None:
        tensors = {"model": ckpt.module_tensors(self.objective), "optimizer": ckpt.optimizer_tensors(self.optimizers)}
        if self.ema is not None:
            with self.ema.applied(self.objective):
                tensors["ema"] = ckpt.module_tensors(self.objective)
        picture = self.data.picture and asdict(self.data.picture)
        state = asdict(self.done) | {"vocab_size": self.data.vocab_size, "picture": picture,
                                     "end_of_text": self.data.end_of_text,
                                     "data": self.data.fingerprint, "meter": meter,
                                     "groups": ckpt.optimizer_groups(self.optimizers)}
        ckpt.save_checkpoint(self.run_dir, self.done.step, tensors, state, self.config.training.keep_checkpoints)

    def warm_start(self, source: str) -> None:
        """Take over the weights of another run."""
        kept = take_over(self.objective, load_run(source), self.data, self.config.training.other_data)
        self.monitor.say(f"weights of {source}; new: {', '.join(kept) or 'none'}")

    def restore(self) -> None:
        """Go on from the newest whole checkpoint, if there is one; what was written after it is dropped."""
        found = every_process(self.accelerator, lambda: ckpt.newest_good(self.run_dir, self.monitor.say))
        if found is not None:
            path, state = found
            recall_data(self.run_dir, state).check(self.data, self.run_dir, AGAIN)
            self.done = Counters.of(state)
            ckpt.load_module(self.objective, ckpt.load_tensors(path, "model"), path / "model.safetensors")
            ckpt.load_optimizers(self.optimizers, ckpt.load_tensors(path, "optimizer"), path / "optimizer.safetensors")
            if self.ema is not None:
                self.ema.load(ckpt.load_tensors(path, "ema"))
            if self.accelerator.is_main_process:
                self.meter = Meter(state["meter"])
                ckpt.set_aside(self.run_dir, newer_than=self.done.step)
                ckpt.point_latest(self.run_dir, path)
        self.monitor.rewind(self.done.step)

    def unwrap(self) -> Objective:
        """The bare objective, in evaluation mode, without what mixed precision put around it."""
        return self.accelerator.unwrap_model(self.module, keep_fp32_wrapper=False).eval()


def micro_batch_size(config: Config, num_processes: int) -> int:
    """Sequences of one micro-batch of one process."""
    training = config.training
    parts = training.accumulation * num_processes
    if training.batch_size % parts:
        raise UserError(f"training.batch_size {training.batch_size} does not split into {num_processes} processes of "
                        f"training.accumulation {training.accumulation} micro-batches; try "
                        f"{max(1, training.batch_size // parts) * parts}")
    return training.batch_size // parts


def clock_of(config: Config, device: torch.device) -> Callable[[], float]:
    """Seconds by `training.clock`. Raises UserError where a processor's time says nothing about training."""
    if config.training.clock == "wall":
        return time.perf_counter
    if device.type != "cpu":
        raise UserError(f"training.clock processor does not see what {device} does; set training.clock to wall")
    return time.process_time


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
