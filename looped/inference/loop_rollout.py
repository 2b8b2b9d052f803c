"""Rollout of a loop: `depth` steps from the initial state, read out at the end or on the way."""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from looped.config.training import EvaluationConfig
from looped.data.batch import Batch
from looped.devices import now
from looped.inference.autoregressive import Writing, one_after_another
from looped.inference.choices import Runs
from looped.inference.cost import Cost
from looped.inference.exits import EarlyExit, Exit
from looped.inference.motion import Motion
from looped.inference.padding import Draws, Reading
from looped.inference.rollout import Answered, Readout, Rollout
from looped.inference.trajectories import Copies, together, trajectories
from looped.models.language import LanguageModel
from looped.nn.cache import Cache
from looped.nn.recurrence import damped
from looped.nn.rows import Rows
from looped.nn.state_noise import with_noise
from looped.objectives.base import rows_of_batch, token_losses
from looped.objectives.bptt import Unrolled
from looped.objectives.leaks import check_cached
from looped.rng import StepRandom
from looped.tensor_types import Float, Int


class LoopRollout(Rollout):
    """Depth is the number of loop steps; the blocks of a core take turns."""

    name = "loop"
    together = True
    encodes = True

    def answers(self, batch: Batch, depths: Sequence[int], config: EvaluationConfig, random: StepRandom,
                exit: Exit | None = None) -> dict[int, Answered]:
        """Answers along one unroll to the deepest depth, or along one for each trajectory, as many at once as
        `evaluation.batch_size` allows; a problem that has exited keeps its answer."""
        e = self.model.encode(batch.inputs, rows_of_batch(batch))
        parts = [self._ends(Copies(batch, random, streams), e, depths, config, exit)
                 for streams in together(trajectories(config), len(batch), config.batch_size)]
        return {depth: Answered.of(Runs.joined([part[depth] for part in parts]), config.choose,
                                   self.answer_cost(depth, config, early=exit is not None)) for depth in depths}

    def _ends(self, copies: Copies, e: Tensor, depths: Sequence[int], config: EvaluationConfig,
              exit: Exit | None) -> dict[int, Runs]:
        """Depth -> the ends of trajectories that run together. e: the embedded problems."""
        batch, halt = copies.batch, getattr(self.objective, "halt_logit", None)
        stopping = EarlyExit(batch, exit, halt=halt, gate=getattr(self.model, "exit_gate", None))
        found, early, motion = {}, exit is not None, Motion(batch)

        def read_out() -> Runs:
            head = None if halt is None else halt(stopping.latent, batch)
            logits, used, residual, head = (
                None if each is None else each.unflatten(0, (len(copies.streams), -1))
                for each in (stopping.logits, stopping.used.clone(), motion.residual, head))
            return Runs(copies.one, logits, used, residual, head)

        # An exit needs a readout after every step.
        states = self.states(copies, max(depths), stopping, e=e, read=None if early else depths,
                             noise=config.state_noise, motion=motion)
        for step, _ in enumerate(states, start=1):
            if step in depths:
                found[step] = read_out()
            if not len(stopping.working):
                break
        return {depth: found.get(depth) or read_out() for depth in depths}

    def answer_cost(self, depth: int, config: EvaluationConfig, *, early: bool = False) -> Cost:
        c, runs = self.model, config.trajectories
        steps = itertools.islice(itertools.cycle(self.model.core_layers), depth)
        if early:
            return Cost(c.num_prelude_layers, tuple(core + c.num_coda_layers for core in steps), runs=runs)
        return Cost(c.num_prelude_layers + runs * c.num_coda_layers, tuple(steps), runs=runs)

    def likelihood_cost(self, depth: int) -> Cost:
        return self.answer_cost(depth, EvaluationConfig())

    def states(self, copies: Copies, depth: int, stopping: EarlyExit, *, e: Tensor | None = None,
               start: Tensor | None = None, read: Collection[int] | None = None, noise: float = 0.0,
               motion: Motion | None = None) -> Iterator[Tensor]:
        """Run the loop on the active rows of `stopping`, and yield the states of all rows after each step.

        e: the embedded problems, if they are there already. start: replaces the model's own initial state. read: the
        steps, counted from 1, that are read out; None: all. noise: `evaluation.state_noise`. motion: sees the changes
        of the state. What a damped step keeps (`recurrence.damping`) is the state with the noise of the step.
        """
        model, batch = self.model, copies.batch
        e = copies.repeat(model.encode(copies.one.inputs, rows_of_batch(copies.one)) if e is None else e)
        rows, width = rows_of_batch(batch), e.shape[-1]
        begin = copies.normal("state", width) if model.recurrence.needs_noise else None
        state = model.initial_state(e, begin) if start is None else start
        for step in range(depth):
            working = stopping.working
            if len(working) < len(state):
                rows = rows_of_batch(batch[working])
            given = before = state[working]
            if noise:
                drawn = copies.normal(f"state noise {step}", before.shape[2:].numel(), stopping.numbers)
                given = with_noise(before, drawn.view_as(before), noise)
            after = model.step(given, e[working], None,
                               rows.having(block=model.recurrence.block_at(step), step=step))
            after = damped(given, after, self.objective.damping)
            if motion is not None:
                motion.take(working, before, after)
            state = state.index_copy(0, working, after)
            if read is None or step + 1 in read:
                stopping.take(model.decode(after, rows), model.recurrence.leave(after))
            else:
                stopping.go_on()
            yield state

    def steps(self, batch: Batch, depth: int, random: StepRandom, *, start: Tensor | None = None) -> Iterator[Readout]:
        stopping = EarlyExit(batch)
        for state in self.states(Copies(batch, random), depth, stopping, start=start):
            yield state, stopping.logits

    def steps_elsewhere(self, batch: Batch, depth: int, random: StepRandom, end: Tensor) -> Iterator[Readout] | None:
        """Steps from other noise or, if the initial state is fixed, from the last state of another problem."""
        if self.model.recurrence.needs_noise:
            return self.steps(batch, depth, random)
        return self.steps(batch, depth, random, start=end.roll(1, 0)) if len(batch) > 1 else None

    @property
    def other_start(self) -> str:
        return "other noise" if self.model.recurrence.needs_noise else "the last state of another problem"

    def cells(self, batch: Batch) -> Tensor | None:
        """Mask of the cells that are not padding."""
        if batch.lengths is None:
            return None
        return torch.arange(batch.targets.shape[1], device=batch.lengths.device) < batch.lengths.unsqueeze(1)

    def losses(self, rows: Int[Tensor, "batch length_and_one"], depths: list[int],
               random: StepRandom) -> list[tuple[int, Tensor, float]]:
        batch = self.objective.ask(rows)
        return self._read(batch, depths, random, lambda logits: token_losses(logits, batch.targets))

    def next_tokens(self, rows: Int[Tensor, "batch length_and_one"], depths: list[int],
                    random: StepRandom) -> list[tuple[int, Tensor, Tensor]]:
        batch = self.objective.ask(rows)
        found = self._read(batch, depths, random, lambda logits: (token_losses(logits, batch.targets),
                                                                  logits.argmax(-1) == batch.targets))
        return [(depth, *both) for depth, both, _ in found]

    def _read(self, batch: Batch, depths: list[int], random: StepRandom,
              what: Callable[[Tensor], Any]) -> list[tuple[int, Any, float]]:
        """(depth, `what` of its logits, seconds) from one unroll; the time at a depth counts the loop up to it and one
        readout."""
        model, around, device = self.model, rows_of_batch(batch), batch.inputs.device
        began = now(device)
        e = model.encode(batch.inputs, around)
        noise = random.normal("state", e.shape[1:]) if model.recurrence.needs_noise else None
        results, reading = [], 0.0

        def read_out(index: int, state: Tensor) -> None:
            nonlocal reading
            if index + 1 in depths:
                start = now(device)
                found = what(model.decode(state, around))
                own = now(device) - start
                results.append((index + 1, found, start - began - reading + own))
                reading += own

        model.unroll(e, around, grad=depths[-1], noise=noise, callback=read_out, damping=self.objective.damping)
        return results

    def check_exits(self, exits: Sequence[Exit]) -> None:
        for exit in exits:
            exit.check(None, getattr(self.model, "exit_gate", None))

    def leave(self, rows: Int[Tensor, "batch length_and_one"], depth: int, exits: Sequence[Exit | None],
              random: StepRandom) -> list[tuple[Tensor, Tensor]]:
        """One unroll serves all exits; each token exits by itself."""
        model, batch = self.model, self.objective.ask(rows)
        around, tokens = rows_of_batch(batch), Batch(batch.inputs.reshape(-1, 1), batch.targets.reshape(-1, 1))
        each = [EarlyExit(tokens, exit, gate=getattr(model, "exit_gate", None)) for exit in exits]
        e = model.encode(batch.inputs, around)
        noise = random.normal("state", e.shape[1:]) if model.recurrence.needs_noise else None

        def read(_: int, state: Tensor) -> None:
            logits, latent = (part.flatten(0, 1).unsqueeze(1)
                              for part in (model.decode(state, around), model.recurrence.leave(state)))
            for stopping in each:
                if len(working := stopping.working):
                    stopping.take(logits[working], latent[working])

        model.unroll(e, around, grad=depth, noise=noise, callback=read, damping=self.objective.damping)
        return [(token_losses(stopping.logits, tokens.targets).view(batch.targets.shape),
                 stopping.used.view(batch.targets.shape)) for stopping in each]

    def first_logits(self, batch: Batch, random: StepRandom) -> Float[Tensor, "batch length vocab"]:
        """Logits after one step."""
        model, rows = self.model, rows_of_batch(batch)
        e = model.encode(batch.inputs, rows)
        noise = random.normal("state", e.shape[1:]) if model.recurrence.needs_noise else None
        return model.decode(model.unroll(e, rows, grad=1, noise=noise, damping=self.objective.damping), rows)

    def write(self, prompt: Int[Tensor, "batch length"], num_tokens: int, depth: int, way: Writing) -> Tensor:
        return one_after_another(LoopWriter(self.objective, depth, way), prompt, num_tokens, way)

    def hidden(self, batch: Batch, depth: int,
               noise: Callable[[Tensor], Tensor]) -> Float[Tensor, "batch length width"]:
        rows = rows_of_batch(batch)
        e = self.model.encode(batch.inputs, rows)
        start = noise(e) if self.model.recurrence.needs_noise else None
        state = self.model.unroll(e, rows, grad=depth, noise=start, damping=self.objective.damping)
        return self.model.hidden(state, rows)


class LoopWriter:
    """Next-token logits of an unrolled loop; keys and values of each loop step are cached. Raises UserError for a
    custom core that mixes rows without its cache."""

    def __init__(self, objective: Unrolled, depth: int, way: Writing):
        check_cached(objective)
        self.model: LanguageModel = objective.model
        self.damping: float = objective.damping
        self.depth = depth
        self.way = way
        self.cache: Cache = Cache()
        self.width: int = 0

    def next_logits(self, new: Int[Tensor, "batch new"], random: StepRandom) -> Tensor:
        """Logits (B, 1, V) after the columns so far and the `new` ones."""
        reading = Reading(new, self.depth, self.way.padding, self.width, self.cache)
        state, rows = read_on(self.model, reading, self.way.draws, self.damping)
        self.width += new.shape[1]
        return self.way.steering(self.model.decode(state, rows)[:, -1:])


def read_on(model: LanguageModel, reading: Reading, draws: Draws,
            damping: float) -> tuple[Float[Tensor, "batch new ..."], Rows]:
    """(state, rows) after the loop has processed the columns of `reading`.

    A random initial state depends on the position alone (`draws`), so a text is the same in whatever pieces it is
    processed."""
    r, stop = reading, reading.first + reading.tokens.shape[1]
    rows = r.padding.rows(r.first, mask=r.padding.mask(stop), cache=r.cache)
    e, noise = model.encode(r.tokens, rows), None
    if model.recurrence.needs_noise:
        noise = r.padding.normal_by_place(draws, "state", r.first, stop, e.shape[-1])
    return model.unroll(e, rows, grad=r.depth, noise=noise, damping=damping), rows
