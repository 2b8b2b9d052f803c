"""A run in training: one optimiser step after another until the budget is used, resumable at any of them.

All randomness and the order of the data are functions of (seed, step), so a checkpoint holds weights, optimiser state
and counters, of a stream also its place, and the same command run again resumes bit for bit. There are two exceptions:
the learning rate and the end of a budget in seconds depend on the clock; and on CUDA some kernels, such as
FlashAttention's backward pass, add by atomics, in another order each time, so results differ by rounding unless
`training.deterministic` is on.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looped.config import Config
from looped.data.batch import Batch
from looped.data.from_config import Data
from looped.data.image_batches import SoughtImages
from looped.domains import domain_of
from looped.errors import UserError
from looped.evaluation.depth_sweep import peak_bytes
from looped.evaluation.image_samples import write_picture
from looped.models.build import build
from looped.nn.cast_once import casts_kept
from looped.nn.checks import require
from looped.objectives import Loss, Objective, build_objective
from looped.objectives.base import figures_of
from looped.rng import RNG, StepRandom
from looped.training import checkpoint as ckpt
from looped.training.block_runs import take_shared
from looped.training.callbacks import Callback
from looped.training.compiled import COMPILE, Compilation, one_graph
from looped.training.counters import Counters
from looped.training.data_identity import recall_data
from looped.training.determinism import only_warned
from looped.training.draw_ahead import DrawAhead, StepDraws
from looped.training.logs import Meter, Monitor
from looped.training.micro_batch import MicroBatches, clock_of
from looped.training.optim import EMA, build_optimizers, lr_factor, set_lr
from looped.training.processes import Processes
from looped.training.resume_rules import same_until
from looped.training.runs import STAMP, load_run
from looped.training.saving import Saver
from looped.training.sharding import LAYOUTS, Whole
from looped.training.signals import Caught
from looped.training.step_checks import check_rule, metrics_of, non_finite, require_loss
from looped.training.warm_start import take_over

ASKED = 1000
"""Stands in for a signal's number if a callback has ended training."""
AGAIN = "bring the old data back, or choose another --run"
"""The fix offered if a resumed run meets other data."""

Evaluate = Callable[[Objective, Data, Config], dict[str, float]]
Sample = Callable[[Objective, Data, Config], str | np.ndarray]


class Trainer:
    """The state of a run in training (`looped.training.train.open_trainer`).

    step(): one optimiser step, and what is due after it. finished: no step is left. stop(): the current step is the
    last. done: steps, tokens and seconds so far; figures: loss, gradient norm and the rule's metrics of the last step;
    objective: the rule with its model.
    """

    def __init__(self, config: Config, run_dir: Path, data: Data, processes: Processes, monitor: Monitor):
        self.config = config
        self.run_dir = run_dir
        self.data = data
        self.processes = processes
        self.accelerator: Any = (accelerator := processes.accelerator)
        self.monitor = monitor
        self.micro: MicroBatches = MicroBatches.of(config, accelerator.process_index, accelerator.num_processes)
        self.objective: Objective = self.new_objective().to(accelerator.device).train()
        check_rule(self)
        if note := self.objective.before_training(data.train):
            monitor.say(note)
        if config.training.warm_start and not ckpt.list_checkpoints(run_dir):
            processes.every(lambda: self.warm_start(config.training.warm_start))
        if config.blocks.shared_from and not ckpt.list_checkpoints(run_dir):
            processes.every(lambda: take_shared(self.objective, config, data.fingerprint))
        self.layout: Whole = LAYOUTS[config.training.shard](accelerator)
        self.layout.check(config)
        self.check_same_folder()
        found = self.find_checkpoint()
        self.layout.place(self.objective)
        self.optimizers: list[torch.optim.Optimizer] = build_optimizers(self.objective, config.optim,
                                                                         self.layout.muon)
        self.ema: EMA | None = EMA(self.objective, config.optim.ema_decay, self.layout.local) \
            if config.optim.ema_decay else None
        self.done: Counters = Counters()
        self.meter: Meter = Meter()
        self.figures: dict[str, float] = {}
        self.seen: int = 0
        self.clock: Callable[[], float] = clock_of(config, accelerator.device)
        self.owed = False
        self.restore(found)
        self.saver: Saver = self.layout.saver(run_dir, config.training.keep_checkpoints, processes,
                                              background=config.training.background_saves)
        self.saved: int = self.done.step
        self.logged: Counters = replace(self.done)
        self.compilation: Compilation = COMPILE[config.training.compile]
        self.compilation.check(config, accelerator.device, accelerator.num_processes)
        self.compilation.rule(self.objective)
        self.compilation.update(self.optimizers)
        self.layout.wrap(self.objective)
        self.ahead: DrawAhead = DrawAhead(lambda step, micro: self.inputs(step, self.rows(micro)),
                                          self.micro.num, threaded=accelerator.device.type != "cpu")
        self.ended = self.asked = 0

    @property
    def fraction(self) -> float:
        """The fraction of the budget that is spent."""
        return self.done.fraction(self.config.training)

    # ---- one step and what is due after it ---------------------------------------------------------------------------

    def attend(self, evaluate: Evaluate, sample: Sample, callbacks: Sequence[Callback], caught: Caught) -> None:
        """Set the functions that evaluate and sample, which all processes call and whose result the first one uses, the
        callbacks, and the signals that end training."""
        require(callbacks, Iterable, "callbacks", "give a list of them")
        for callback in callbacks:
            require(callback, Callback, "a callback", "give an object of a class derived from it")
        self.evaluates, self.samples, self.callbacks, self.caught = evaluate, sample, tuple(callbacks), caught

    @property
    def finished(self) -> bool:
        """True if no step is left: the budget is used, or something has ended training."""
        return self.fraction >= 1 or self.ended != 0

    @property
    def signal(self) -> int:
        """The signal that ended training before its budget was used, 0 if none did."""
        return self.ended if self.fraction < 1 and self.ended != ASKED else 0

    def stop(self) -> None:
        """End training after the current step, on all processes if called on any."""
        self.asked = ASKED

    def step(self) -> None:
        """One optimiser step, then what is due: a line of the log, an evaluation, a sample, a checkpoint. Raises
        UserError if no step is left."""
        if self.finished:
            raise UserError(f"the run {self.run_dir} is at its end, after step {self.done.step}; raise training.budget "
                            f"to train further")
        config = self.config.training
        before = self.done.due(config)
        self.train_step()
        for callback in self.callbacks:
            callback.on_step(self)
        saves, self.caught.saves = self.caught.saves, False
        self.ended, saves, lost = self.agree(self.caught.number or self.asked, saves, self.saver.failed)
        if lost:
            self.saver.wait()  # which raises its error, on all processes
        self.saver.reserve(self.tensors)  # the optimisers have their state since the first step
        step, over = self.done.step, self.fraction >= 1
        logs = over or step % config.log_every == 0
        evaluates = over or self.done.due(config) > before or _due(step, config.eval_every)
        if logs:
            self.log()
        self.owed = evaluates
        if self.finished or saves or _due(step, config.checkpoint_every):
            self.save()  # first, so that an interrupted evaluation costs no step
        if evaluates:
            self.evaluate()
        if _due(step, config.sample_every):
            self.sample()
        if logs or evaluates:  # their callbacks may have ended training
            self.ended = self.ended or self.agree(self.asked)[0]
            if self.finished:
                self.save()

    def catch_up(self) -> None:
        """Run the evaluation that was due at the checkpoint's step, if it was interrupted."""
        if any(self.processes.gather([self.owed])):
            self.evaluate()

    def train_step(self) -> None:
        """Forward and backward over the micro-batches, the checks, then the update."""
        start = self.clock()
        set_lr(self.optimizers, lr_factor(self.fraction, self.done.step, self.config.optim))
        self.objective.before_step(self.fraction)
        losses = [self.backward(micro) for micro in range(self.micro.num)]
        self.check(losses, self.clip())
        for optimizer in self.optimizers:
            optimizer.step()
        if self.ema is not None:  # before zero_grad, since weights without gradient keep their averages
            self.ema.update(self.objective, self.done.step)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.objective.after_step()
        self.count(self.clock() - start)

    def rows(self, micro: int) -> range:
        """The rows of the optimiser step that are this process's in a micro-batch."""
        return self.micro.rows(micro)

    def inputs(self, step: int, rows: range) -> tuple[Tensor | Batch | SoughtImages, StepRandom]:
        """Tokens, problems or images of some rows of a step, on the host, and their randomness."""
        c, device = self.config, self.accelerator.device
        batch = self.data.train.batch(step, rows=rows, **self.batch_settings())
        return batch, RNG[c.training.rng](c.seed, step, start=rows.start, count=len(rows),
                                          total=c.training.batch_size, device=device)

    @property
    def mean_num(self) -> float:
        """Mean number of micro-batches per process; processes exchange the mean of their sums over it."""
        return self.micro.total / self.accelerator.num_processes

    def batch_settings(self) -> dict[str, int]:
        """The settings that determine the order of the data, besides the step."""
        c = self.config
        return {"batch_size": c.training.batch_size, "seed": c.seed, **domain_of(c).order(c)}

    def backward(self, micro: int) -> Loss:
        """Add a micro-batch's gradients; processes exchange them after the last one only."""
        num = self.micro.num
        with self.layout.micro_batch(first=micro == 0, last=micro == num - 1), casts_kept():
            batch, draws = self.ahead.get(self.done.step, micro)
            self.seen += (Batch.of(batch) if isinstance(batch, Tensor) else batch).num_tokens
            loss = self.run(batch.to(self.accelerator.device, non_blocking=True), draws.on_device())
            self.ahead.used(draws)
            require_loss(loss, self.objective)
            self.accelerator.backward(loss.value / self.mean_num)
        return replace(loss, value=loss.value.detach())

    def run(self, batch: Tensor | Batch | SoughtImages, draws: StepDraws) -> Loss:
        """The loss of a micro-batch. A graph of the whole rule needs all draws beforehand; without them the rule runs
        eagerly, which lists what it draws."""
        listing = self.compilation.whole and not draws.complete
        eager = torch.compiler.set_stance("force_eager") if listing else nullcontext()
        with eager, one_graph(self.config.objective):
            return self.layout.module(batch, draws)

    def clip(self) -> Tensor:
        """Clip the gradient, and return its norm before clipping."""
        return self.layout.clip(list(self.objective.parameters()), self.config.optim.grad_clip or math.inf)

    def check(self, losses: list[Loss], norm: Tensor) -> None:
        """Raise before the update if the loss or the gradient is not finite; record the metrics otherwise."""
        value = self.accelerator.reduce(torch.stack([loss.value for loss in losses]).sum() / self.mean_num, "mean")
        whole = Loss(value, {"loss": value, "grad_norm": norm})
        *parts, whole = figures_of([*losses, whole])
        if not (math.isfinite(whole["loss"]) and math.isfinite(whole["grad_norm"])):
            raise non_finite(self, whole["loss"], whole["grad_norm"])
        for figures in parts:
            self.meter.add({name: value for name, value in figures.items() if name != "loss"})
        self.meter.add(whole)
        self.figures = parts[-1] | whole

    def count(self, seconds: float) -> None:
        """Count one more step."""
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

    def agree(self, number: int, *flags: bool) -> list[int]:
        """The signal that any process has caught, 0 for none, and for each flag whether any process has set it. The
        clocks of all processes, which a budget may be in, are set to their mean."""
        if self.accelerator.num_processes == 1:
            return [number, *flags]
        own = [[round(self.done.seconds * 1e9), number, *flags]]  # whole nanoseconds: a device may have no float64
        everyone = self.accelerator.gather(torch.tensor(own, device=self.accelerator.device)).cpu()
        self.done.seconds = everyone[:, 0].double().mean().item() / 1e9
        return everyone[:, 1:].max(0).values.tolist()

    # ---- reports -----------------------------------------------------------------------------------------------------

    def joint_meter(self) -> Meter:
        """The sums of all processes."""
        meter = Meter()
        meter.merge(self.processes.gather([self.meter.sums]))
        return meter

    def log(self) -> None:
        """Write a line with the means since the last one."""
        done, last = self.done, self.logged
        rate = (done.tokens - last.tokens) / max(done.seconds - last.seconds, 1e-9)
        values = self.joint_meter().means() | {"lr": self.optimizers[0].param_groups[0]["lr"]} | asdict(done)
        values |= {"tokens_per_second": rate, "peak_bytes": peak_bytes()}
        self.monitor.metrics("train", values.pop("step"), values)
        self.monitor.progress(done.step, self.fraction, values)
        if self.accelerator.is_main_process:
            for callback in self.callbacks:
                callback.on_log(self, values)
        self.meter, self.logged = Meter(), replace(done)

    def evaluate(self) -> None:
        """Evaluate the EMA weights (or the plain ones if there are none)."""
        found = self.on_eval(self.evaluates)
        if self.processes.is_first:
            values = metrics_of(found)
            counts = asdict(self.done)
            self.monitor.metrics("heldout", counts.pop("step"), counts | values)
            self.monitor.say(f"step {self.done.step}  held-out  "
                             + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
            for callback in self.callbacks:
                callback.on_evaluation(self, values)

    def sample(self) -> None:
        """Sample text or a picture with the EMA weights (or the plain ones if there are none)."""
        made = self.on_eval(self.samples)
        if self.processes.is_first:
            shown = made if isinstance(made, str) else self.keep_picture(made)
            self.monitor.say(f"step {self.done.step}  sample\n{shown}")

    def keep_picture(self, pixels: np.ndarray) -> Path:
        """Save a sample that is a picture, and return its path."""
        path = self.run_dir / "samples" / f"step-{self.done.step:08d}.png"
        write_picture(pixels, path)
        return path

    def on_eval(self, work: Evaluate | Sample) -> Any:
        """Result of `work` in evaluation mode and with EMA weights; all processes call it, with the whole model."""
        averaged = self.ema.applied(self.objective) if self.ema is not None else nullcontext()
        self.objective.eval()
        whole = self.layout.whole_model(self.objective)  # inside, since its weights are those that are averaged
        with averaged, whole, only_warned(), self.accelerator.autocast(), torch.no_grad():
            value = work(self.objective, self.data, self.config)
        self.objective.train()
        return value

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Begin to save a checkpoint of this step."""
        meter = self.joint_meter().sums
        if self.saved != self.done.step:
            picture = self.data.picture and asdict(self.data.picture)
            places = self.processes.gather([domain_of(self.config).place(self.data, self.done.step)])
            state = asdict(self.done) | {"vocab_size": self.data.vocab_size, "picture": picture,
                                         "end_of_text": self.data.end_of_text,
                                         "data": self.data.fingerprint, "meter": meter, "owed": self.owed,
                                         "places": places if any(places) else None,
                                         ckpt.ANY_BUDGET: self.fraction <= same_until(self.config),
                                         "groups": ckpt.optimizer_groups(self.optimizers)}
            self.saver.save(self.tensors(), state)
            self.saved = self.done.step

    def tensors(self) -> dict[str, ckpt.Tensors]:
        """The tensors of a checkpoint, by part."""
        return self.layout.tensors(self.objective, self.optimizers, self.ema)

    def warm_start(self, source: str) -> None:
        """Copy the weights of another run."""
        self.monitor.say(take_over(self.objective, self.config, load_run(source), self.data))

    def find_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """(path, state) of the newest intact checkpoint, which the first process looks for; None if there is none."""
        found = self.processes.shared(lambda: ckpt.newest_good(self.run_dir, self.monitor.say))
        if found is not None:
            recall_data(self.run_dir, found[1]).check(self.data, self.run_dir, AGAIN)
        return found

    def restore(self, found: tuple[Path, dict[str, Any]] | None) -> None:
        """Resume from a checkpoint, if there is one; what was written after it is dropped."""
        if found is not None:
            path, state = found
            self.done = Counters.of(state)
            self.owed = bool(state.get("owed")) and not self.monitor.evaluated(self.done.step)
            layout, objective = self.layout, self.objective
            ckpt.copy_tensors(layout.model_tensors(objective), layout.read(path, "model", objective),
                              ckpt.part_of(path, "model"))
            ckpt.load_optimizers(self.optimizers, layout.read(path, "optimizer", objective),
                                 ckpt.part_of(path, "optimizer"))
            if self.ema is not None:
                self.ema.load(layout.read(path, "ema", objective))
            layout.carry_on(path, objective)
            if self.accelerator.is_main_process:
                self.meter = Meter(state["meter"])
                ckpt.set_aside(self.run_dir, newer_than=self.done.step)
                ckpt.point_latest(self.run_dir, path)
        domain_of(self.config).go_to(self.data, found and found[1].get("places"), self.accelerator.process_index,
                                     self.accelerator.num_processes)
        self.monitor.rewind(self.done.step)

    def check_same_folder(self) -> None:
        """Raise UserError unless all processes see the same folder."""
        stamp = self.run_dir / STAMP
        seen = hashlib.sha256(stamp.read_bytes()).hexdigest()[:12] if stamp.exists() else "none"
        self.processes.check_same({"stamp of the run": seen}, f"put the run {self.run_dir} in a folder that all nodes "
                                  f"share")

    def new_objective(self) -> Objective:
        """The rule of the config with a new model."""
        return build_objective(self.config, build(self.config, self.data.vocab_size, self.data.picture),
                               self.data.end_of_text)

    def unwrap(self) -> Objective:
        """The bare objective with the whole model, in evaluation mode."""
        return self.layout.bare(self.objective, self.new_objective).eval()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
