"""The answers of a trained model to a batch of problems, at any depth and with any exit.

A loop is unrolled; a denoiser runs its solver from pure noise (or from zero, `denoise.start`), once or along several
trajectories (`evaluation.trajectories`). What has left by its exit is left out of the batch that the network sees.
Every draw depends on the problem's number alone, so that a problem is solved the same in any batch, to rounding.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from looped.config.training import EvaluationConfig
from looped.data.batch import Batch
from looped.diffusion.bridge import bridge
from looped.diffusion.denoiser import levels_of
from looped.diffusion.solve import solve
from looped.evaluation.exits import Exit, Stopping
from looped.evaluation.inference_cost import NUM_CHECKS, Cost, answer_cost, check_level
from looped.nn.rows import Rows
from looped.objectives.base import Classifier, Objective, rows_of_batch
from looped.objectives.bptt import Unrolled
from looped.objectives.denoise import Denoise, only_sought
from looped.rng import StepRandom


@dataclass(frozen=True)
class Answered:
    """`answers`: the likeliest symbol of each cell. `used`: the steps each problem took, summed over trajectories.
    `layer_forwards`, `evaluations` (NFE): what was run for it."""

    answers: Int[Tensor, "batch length"]
    used: Int[Tensor, "batch"]
    layer_forwards: Float[Tensor, "batch"]
    evaluations: Float[Tensor, "batch"]


@torch.no_grad()
def answer(objective: Objective, batch: Batch, depths: Sequence[int], config: EvaluationConfig, *, seed: int = 0,
           first: int = 0, exit: Exit | None = None) -> dict[int, Answered]:
    """Depth -> the answers there; with an `exit`, depth is the most steps that a problem may take.

    first: the number of the batch's first problem. Raises UserError for an exit that the model cannot take.
    """
    random = StepRandom(seed, 0, start=first, count=len(batch), device=batch.inputs.device)
    if isinstance(objective, Classifier):
        return {depth: _answers_of_classifier(objective, batch, depth, random, config) for depth in depths}
    if not isinstance(objective, Denoise):
        return _answers_of_loop(objective, batch, depths, random, config, exit)
    return {depth: _answers_of_denoiser(Solver(objective, batch), depth, random, config, exit) for depth in depths}


def _trajectories(config: EvaluationConfig) -> list[str]:
    """What the draws of each are called by."""
    return [f"trajectory{number} " if number else "" for number in range(config.trajectories)]


def _answered(answers: Int[Tensor, "batch length"], used: Int[Tensor, "runs batch"], cost: Cost) -> Answered:
    """The answers of runs of `cost` that ended after so many steps."""
    return Answered(answers, used.sum(0) + len(cost.checks), *cost.spent(used))


# ---- classifiers of their own kind -----------------------------------------------------------------------------------


def _answers_of_classifier(objective: Classifier, batch: Batch, depth: int, random: StepRandom,
                           config: EvaluationConfig) -> Answered:
    """The class of each image, likeliest under the mean over trajectories."""
    runs = [objective.class_logits(batch, depth, random, stream=stream) for stream in _trajectories(config)]
    named = torch.stack([logits.softmax(-1) for logits in runs]).mean(0).argmax(-1)
    cost = answer_cost(objective, depth, config)
    return _answered(named.unsqueeze(1), named.new_full((len(runs), len(named)), len(cost.readings)), cost)


# ---- loops -----------------------------------------------------------------------------------------------------------


def _answers_of_loop(objective: Unrolled, batch: Batch, depths: Sequence[int], random: StepRandom,
                     config: EvaluationConfig, exit: Exit | None) -> dict[int, Answered]:
    """Read along one unroll to the deepest: what has settled by its exit stays as it is."""
    stopping = Stopping(batch, exit, halt=getattr(objective, "halt_logit", None))
    found, early = {}, exit is not None

    def read_out(depth: int) -> Answered:
        return _answered(stopping.logits.argmax(-1), stopping.used.unsqueeze(0),
                         answer_cost(objective, depth, config, early=early))

    # An exit asks for the answer after every step.
    states = loop_states(objective, batch, max(depths), random, stopping, read=None if early else depths)
    for step, _ in enumerate(states, start=1):
        if step in depths:
            found[step] = read_out(step)
        if not stopping.active.any():
            break
    return {depth: found.get(depth) or read_out(depth) for depth in depths}


def loop_states(objective: Unrolled, batch: Batch, depth: int, random: StepRandom, stopping: Stopping, *,
                start: Tensor | None = None, read: Collection[int] | None = None):
    """Run the loop on the rows that `stopping` has at work, and yield the states of all rows after each step; from
    `start` instead of the model's own initial state, if given. read: the steps, counted from 1, that are read out;
    None: every one.

    With `recurrence.damping` d a step is s <- d s + (1 - d) step(s).
    """
    model, damping = objective.model, objective.config.damping
    rows = rows_of_batch(batch)
    e = model.encode(batch.inputs, rows)
    noise = own_normal(random, "state", batch, e.shape[-1]) if model.recurrence.needs_noise else None
    state = model.initial_state(e, noise) if start is None else start
    for step in range(depth):
        working = stopping.working
        if len(working) < len(state):
            rows = rows_of_batch(batch[working])
        before = state[working]
        after = model.step(before, e[working], None, rows.having(block=model.recurrence.block_at(step)))
        after = after if damping == 0 else damping * before + (1 - damping) * after
        state = state.index_copy(0, working, after)
        if read is None or step + 1 in read:
            stopping.take(model.decode(after, rows), after)
        else:
            stopping.go_on()
        yield state


# ---- denoisers -------------------------------------------------------------------------------------------------------


class Solver:
    """The configured solver of a denoiser on one batch of problems."""

    def __init__(self, objective: Denoise, batch: Batch):
        self.objective, self.batch, self.rows = objective, batch, rows_of_batch(batch)
        self.denoiser, self.config = objective.denoiser, objective.config
        self.e = objective.model.encode(batch.inputs, self.rows)
        self.context = objective.model.make_context(self.e, self.config.context, self.rows)
        self.rows = self.rows.having(context=self.context)

    def run(self, depth: int, random: StepRandom, *, stream: str = "", exit: Exit | None = None,
            watch: Callable[[int, Tensor, Tensor, Tensor], None] | None = None) -> Stopping:
        """`depth` readings from pure noise, of the problems still at work. `watch(step, z, logits, D)` sees each."""
        stopping, carry, estimate = Stopping(self.batch, exit), None, None

        def denoise(z: Tensor, level: float | Tensor) -> Tensor:
            nonlocal carry, estimate
            working = stopping.working
            if not len(working):
                return estimate
            z = only_sought(z.float(), self.batch)
            step = int(stopping.used.max())
            uniform = random.uniform(f"{stream}bridge{step}", z.shape[1:2])
            logits, handed = self._read(z, level, working, carry)
            soft = bridge("soft", logits, self.denoiser.table())
            new = self.denoiser.estimate(logits, uniform[working.to(uniform.device)])
            stopping.take(logits, soft)
            estimate = _put(estimate, working, new, len(z))
            carry = None if handed is None else _put(carry, working, handed, len(z))
            if watch is not None:
                watch(step, z, logits, new)
            return estimate

        solve(self.config, self.objective.noise, denoise, depth,
              normal=lambda name: own_normal(random, f"{stream}{name}", self.batch, self.denoiser.targets.dim),
              confidence=lambda: stopping.logits.softmax(-1).amax(-1), sought=self.batch.sought)
        return stopping

    def _read(self, z: Tensor, level: float | Tensor, working: Tensor,
              carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits of the problems at work, and what the step hands on."""
        sigma = levels_of(z, level)
        if len(working) == len(z):
            return self._guided(z, sigma, self.e, self.rows, carry)
        if self.context is not None:  # its keys and values are those of the whole batch
            logits, handed = self.denoiser.read(z, sigma, self.e, self.rows, carry=carry)
            return logits[working], None if handed is None else handed[working]
        return self._guided(z[working], sigma[working.to(sigma.device)], self.e[working],
                            rows_of_batch(self.batch[working]), None if carry is None else carry[working])

    def _guided(self, z: Tensor, sigma: Tensor, e: Tensor, rows: Rows,
                carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits, handed = self.denoiser.read(z, sigma, e, rows, carry=carry)
        return self.denoiser.guided(logits, z, sigma, e, rows, carry=carry), handed

    def consistency(self, answers: Int[Tensor, "batch length"], random: StepRandom,
                    stream: str) -> Float[Tensor, "batch"]:
        """How sure the denoiser is of an answer that it is shown noised afresh: its mean log-probability a cell, read
        at the geometric middle of the levels, over `NUM_CHECKS` noisings."""
        target, level, total = self.denoiser.target(answers), check_level(self.objective), 0.0
        for check in range(NUM_CHECKS):
            eps = own_normal(random, f"{stream}check{check}", self.batch, target.shape[-1])
            logits = self.denoiser(only_sought(target + level * eps, self.batch), levels_of(target, level), self.e,
                                   self.rows)
            total = total + self.batch.mean(logits.log_softmax(-1).gather(-1, answers.unsqueeze(-1)).squeeze(-1))
        return total / NUM_CHECKS


def _answers_of_denoiser(solver: Solver, depth: int, random: StepRandom, config: EvaluationConfig,
                         exit: Exit | None) -> Answered:
    """Of one trajectory; of several, the likeliest under their mean readout, or the answer that is surest of itself."""
    streams = _trajectories(config)
    runs = [solver.run(depth, random, stream=stream, exit=exit) for stream in streams]
    used, cost = torch.stack([run.used for run in runs]), answer_cost(solver.objective, depth, config)
    if config.choose == "mean" or len(runs) == 1:
        return _answered(torch.stack([run.logits.softmax(-1) for run in runs]).mean(0).argmax(-1), used, cost)
    answers = torch.stack([run.logits.argmax(-1) for run in runs])  # trajectories, B, L
    surest = torch.stack([solver.consistency(each, random, stream)
                          for each, stream in zip(answers, streams, strict=True)]).argmax(0)
    return _answered(answers[surest, torch.arange(len(surest), device=used.device)], used, cost)


def _put(old: Tensor | None, rows: Tensor, new: Tensor, num: int) -> Tensor:
    """`new` in the rows of a batch of `num`, the other rows as they were."""
    return new if len(rows) == num else old.index_copy(0, rows, new)


def own_normal(random: StepRandom, stream: str, batch: Batch, dim: int) -> Float[Tensor, "batch length dim"]:
    """Standard normal draws for each row of each sequence, which do not depend on how far the batch is filled up."""
    length = batch.targets.shape[1]
    if batch.lengths is None:
        return random.normal(stream, (length, dim))
    rows = [torch.randn((int(real), dim), generator=gen)
            for real, gen in zip(batch.lengths, random.per_row(stream), strict=True)]
    filled = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])
    return filled.to(random.device)
