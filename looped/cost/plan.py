"""Plan of a run on several devices: memory, bytes sent and time of a step, from counts of the config, before it is run.

Sizes are those of the tensors, without the allocator's fragments and the working memory of kernels. A ring of N
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
    """Memory of one process, in bytes. during: what is there in the step alone, besides activations: whole weights and
    gradients of a sharded model, the buffers in which DDP adds gradients up."""

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
    gathering them; steps: None for a budget in seconds; seconds: of a step, None without a speed."""

    counts: Counts
    devices: int
    rows: int
    memory: Bytes
    most_rows: int | None
    sent: float
    gathered: float
    step_flops: int
    steps: int | None
    seconds: float | None


def plan(config: Config, vocab_size: int, *, devices: int, limit: float | None = None,
         flops: float | None = None) -> Plan:
    """The plan of a config on so many devices. limit: bytes of memory of each; flops: FLOP/s that each really does.
    Raises UserError if the batch does not go round."""
    part = MicroBatches.of(config, 0, devices)
    whole = count(config, vocab_size)
    fixed, per_row = _activations(config, vocab_size)
    share = 1 / devices if config.training.shard == "fsdp" else 1.0
    sharded, several = share < 1, devices > 1
    weights, gradients = WIDE * whole.parameters, WIDE * whole.gradients
    memory = Bytes(weights * share, gradients * share, WIDE * whole.moments * share,
                   weights * share * (config.optim.ema_decay > 0),
                   weights + gradients if sharded else gradients * several, fixed + per_row * part.size)
    ring = (devices - 1) / devices
    travelling = 2 * HALF * whole.matrices
    room = None if limit is None else limit - (memory.total - per_row * part.size)
    steps = _steps(config, whole)
    return Plan(whole, devices, part.size, memory, None if room is None else max(0, math.floor(room / per_row)),
                ring * (weights + gradients + travelling if sharded else 2 * gradients), weights * sharded,
                whole.step_flops, steps, None if flops is None else whole.step_flops / (devices * flops))


def _activations(config: Config, vocab_size: int) -> tuple[float, float]:
    """(bytes kept whatever the batch, bytes kept per sequence)."""
    one, two = (count(config.replace(**{"training.batch_size": rows, "training.accumulation": 1}), vocab_size)
                .saved_activation_bytes for rows in (1, 2))
    return 2 * one - two, two - one


def _steps(config: Config, counts: Counts) -> int | None:
    """Optimiser steps of the budget; None if it is in seconds."""
    training = config.training
    per_step = {"steps": 1, "tokens": training.batch_size * counts.tokens,
                "layer-forwards": training.batch_size * counts.layer_forwards}.get(training.budget_unit)
    return None if per_step is None else math.ceil(training.budget / per_step)


def bytes_of(text: str) -> float:
    """`80GB`, `512 MB` or a plain number as bytes. Raises UserError."""
    number = text.strip().upper().removesuffix("B")
    scale = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(number[-1:], 1.0)
    try:
        found = float(number.rstrip("KMGT ")) * scale
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise UserError(f"--memory {text!r} is no size; write for instance 80GB or 512MB")
    return found


def format_plan(plan: Plan) -> str:
    """The plan as text, one figure per line."""
    m, mega = plan.memory, 1e6
    rows = [("parameters", f"{plan.counts.parameters:,}"), ("devices", f"{plan.devices}, one process each"),
            ("weights", f"{m.weights / mega:,.1f} MB"), ("gradients", f"{m.gradients / mega:,.1f} MB"),
            ("optimiser state", f"{m.optimiser / mega:,.1f} MB"), ("averaged weights", f"{m.averages / mega:,.1f} MB"),
            ("during a step", f"{m.during / mega:,.1f} MB of whole weights, whole gradients or buffers for sums"),
            ("activations", f"{m.activations / mega:,.1f} MB for a micro-batch of {plan.rows} sequences"),
            ("memory", f"{m.total / mega:,.1f} MB per process")]
    if plan.most_rows is not None:
        rows.append(("largest micro-batch", f"{plan.most_rows:,} sequences" if plan.most_rows else
                     "none fits; shard the model (training.shard fsdp), or take a smaller one"))
    rows += [("sent", f"{plan.sent / mega:,.1f} MB per process and step"),
             ("FLOPs", f"{plan.step_flops:.3e} per step, over all processes")]
    if plan.steps is not None:
        rows.append(("steps", f"{plan.steps:,}"))
    if plan.seconds is not None:
        rows.append(("time", f"{plan.seconds:,.3g} s per step" + (
            "" if plan.steps is None else f", {plan.seconds * plan.steps / 3600:,.2f} h in all")))
    return "\n".join(f"{name:<24}{value}" for name, value in rows)
