"""Plan of a run on several devices: memory, bytes sent and time of a step, from counts of the config, before it is run.

Sizes are those of the tensors, without the allocator's fragmentation and the working memory of kernels. A ring of N
processes sends (N - 1) / N of a tensor's bytes per process to gather it or to scatter its sum, and twice that to add it
up on all. On shards Muon sends each matrix in bf16 to its owner and back, of which 1 / N stays on average.
"""

import math
from dataclasses import dataclass

from looped.config import Config
from looped.cost.counts import WIDE, Counts, count
from looped.errors import UserError
from looped.training.micro_batch import MicroBatches

HALF = 2
"""Bytes per bfloat16."""


@dataclass(frozen=True)
class Bytes:
    """Memory of one process, in bytes. during: held in the step alone, besides activations: whole weights and
    gradients of a sharded model, DDP's reduction buffers."""

    weights: float
    gradients: float
    optimiser: float
    averages: float
    during: float
    activations: float

    @property
    def total(self) -> float:
        return sum((self.weights, self.gradients, self.optimiser, self.averages, self.during, self.activations))


@dataclass(frozen=True)
class Plan:
    """A run on `devices` processes. rows: sequences of a micro-batch; most_rows: as many as fit the memory, None
    without a limit; sent: bytes that a process sends per step; gathered: bytes of the weights that a process has after
    gathering them; update_flops: per step, of Muon on all devices; steps: None for a budget in seconds; seconds: of a
    step, None without a speed; writing: seconds in which a disk takes a checkpoint, None without its speed."""

    counts: Counts
    devices: int
    rows: int
    memory: Bytes
    most_rows: int | None
    sent: float
    gathered: float
    step_flops: int
    update_flops: int
    steps: int | None
    seconds: float | None
    writing: float | None


def plan(config: Config, vocab_size: int, *, devices: int, limit: float | None = None,
         flops: float | None = None, disk: float | None = None) -> Plan:
    """The plan of a config on so many devices. limit: bytes of memory of each; flops: FLOP/s that each really does;
    disk: bytes per second that the disk of the run writes. Raises UserError if the batch does not go round."""
    part = MicroBatches.of(config, 0, devices)
    whole = count(config.replace(**{"training.accumulation": part.total}), vocab_size)
    fixed, per_row = _activations(config, vocab_size, part.size)
    share = 1 / devices if config.training.shard == "fsdp" else 1.0
    sharded, several = share < 1, devices > 1
    weights, gradients = WIDE * whole.parameters, WIDE * whole.gradients
    summed = WIDE * whole.trained
    memory = Bytes(weights * share, gradients * share, WIDE * whole.moments * share,
                   weights * share * (config.optim.ema_decay > 0),
                   weights + gradients if sharded else summed * several, fixed + per_row * part.size)
    ring = (devices - 1) / devices
    travelling = 2 * HALF * whole.matrices / devices  # each to its owner and back, of what a process has of it
    room = None if limit is None else limit - (memory.total - per_row * part.size)
    updates = whole.update_flops * (1 if sharded else devices)
    return Plan(
        counts=whole, devices=devices, rows=part.size, memory=memory,
        most_rows=None if room is None else max(0, math.floor(room / per_row)),
        sent=ring * (weights + gradients + travelling if sharded else 2 * summed), gathered=weights * sharded,
        step_flops=whole.step_flops, update_flops=updates, steps=_steps(config, whole),
        seconds=None if flops is None else (whole.step_flops + whole.again_flops + updates) / (devices * flops),
        writing=None if disk is None else whole.checkpoint_bytes / disk)


def _activations(config: Config, vocab_size: int, rows: int) -> tuple[float, float]:
    """(bytes kept whatever the batch, bytes kept per sequence), from micro-batches of `rows` and of twice as many."""
    one, two = (count(config.replace(**{"training.batch_size": num, "training.accumulation": 1}), vocab_size)
                .saved_activation_bytes for num in (rows, 2 * rows))
    return 2 * one - two, (two - one) / rows


def _steps(config: Config, counts: Counts) -> int | None:
    """Optimiser steps of the budget; None if it is in seconds."""
    training = config.training
    per_step = {"steps": 1, "tokens": training.batch_size * counts.tokens,
                "layer-forwards": training.batch_size * counts.layer_forwards}.get(training.budget_unit)
    return None if per_step is None else math.ceil(training.budget / per_step)


def bytes_of(text: str, flag: str) -> float:
    """`80GB`, `512 MB` or a plain number, the value of a flag, as bytes. Raises UserError."""
    number = text.strip().upper().removesuffix("B")
    scale = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(number[-1:], 1.0)
    try:
        found = float(number.rstrip("KMGT ")) * scale
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise UserError(f"{flag} {text!r} is not a size; write e.g. 80GB or 512MB")
    return found


def _sequences(num: int) -> str:
    return f"{num:,} sequence{'s' * (num != 1)}"


def format_plan(plan: Plan) -> str:
    """The plan as text, one figure per line."""
    m, mega = plan.memory, 1e6
    rows = [("parameters", f"{plan.counts.parameters:,}"), ("devices", f"{plan.devices}, one process each"),
            ("weights", f"{m.weights / mega:,.1f} MB"), ("gradients", f"{m.gradients / mega:,.1f} MB"),
            ("optimiser state", f"{m.optimiser / mega:,.1f} MB"), ("averaged weights", f"{m.averages / mega:,.1f} MB"),
            ("during a step", f"{m.during / mega:,.1f} MB of whole weights, whole gradients or reduction buffers"),
            ("activations", f"{m.activations / mega:,.1f} MB for a micro-batch of {_sequences(plan.rows)}"),
            ("memory", f"{m.total / mega:,.1f} MB per process")]
    if plan.most_rows is not None:
        rows.append(("largest micro-batch", _sequences(plan.most_rows) if plan.most_rows else
                     "none fits; shard the model (training.shard fsdp), or take a smaller one"))
    rows += [("sent", f"{plan.sent / mega:,.1f} MB per process and step"),
             ("FLOPs", f"{plan.step_flops:.3e} per step, over all processes" + (
                 f", and {again:.3e} of layers computed again" if (again := plan.counts.again_flops) else "") + (
                 f", and {update:.3e} of the optimiser in each" if (update := plan.counts.update_flops) else ""))]
    if plan.steps is not None:
        rows.append(("steps", f"{plan.steps:,}"))
    rows.append(("checkpoint", f"{plan.counts.checkpoint_bytes / mega:,.1f} MB" + (
        "" if plan.writing is None else f", {plan.writing:,.3g} s to write")))
    if plan.seconds is not None:
        rows.append(("time", f"{plan.seconds:,.3g} s per step" + (
            "" if plan.steps is None else f", {plan.seconds * plan.steps / 3600:,.2f} h in all")))
    return "\n".join(f"{name:<24}{value}" for name, value in rows)
