"""Rollout of a denoiser: `depth` steps of its configured solver, along one trajectory or several.

Each of the `evaluation.trajectories` starts from pure noise; with `denoise.start zero` the first starts from zero, and
only the others, which would equal it, from noise. Problems that have exited are dropped from the network's batch,
unless a clean context covers the whole batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from looped.config.denoise import DenoiseConfig
from looped.config.training import EvaluationConfig
from looped.data.batch import Batch
from looped.devices import now, to_device
from looped.diffusion.clean_estimate import bridge
from looped.diffusion.denoiser import Denoiser, levels_of
from looped.diffusion.edm import align
from looped.diffusion.samplers import Settling
from looped.diffusion.schedules import block_schedule
from looped.diffusion.second_reading import check_level, second_readings
from looped.diffusion.solver_from_config import evaluated_levels, solve
from looped.inference.autoregressive import Writing, one_after_another
from looped.inference.choices import Runs, choice_of
from looped.inference.cost import NUM_CHECKS, Cost
from looped.inference.exits import EarlyExit, Exit
from looped.inference.motion import Motion
from looped.inference.rollout import Answered, Likelihood, Readout, Rollout
from looped.inference.text_denoising import DenoiseWriter, TeacherForced, bound, known_at_start
from looped.inference.trajectories import own_normal, trajectories
from looped.nn.cache import Cache
from looped.nn.rows import Rows
from looped.objectives.base import rows_of_batch, token_losses
from looped.objectives.denoise import Denoise, only_sought
from looped.rng import StepRandom
from looped.tensor_types import Float, Int


class SolverRollout(Rollout):
    """Depth is the number of solver steps; with several core blocks, the owner of a step's noise level runs it."""

    name = "solver"
    latent = "soft estimate"
    samples = True

    @property
    def tokens_at_once(self) -> int:
        return self.objective.config.block_size

    def answers(self, batch: Batch, depths: Sequence[int], config: EvaluationConfig, random: StepRandom,
                exit: Exit | None = None) -> dict[int, Answered]:
        return {depth: self._answer(Solver(self.objective, batch), depth, random, config, exit) for depth in depths}

    def _answer(self, solver: "Solver", depth: int, random: StepRandom, config: EvaluationConfig,
                exit: Exit | None) -> Answered:
        """The answer of one trajectory, or the one chosen among several."""
        streams, batch = trajectories(config), solver.batch
        motions = [Motion(batch) for _ in streams]
        starts = [solver.config.start, *("noise" for _ in streams[1:])]
        ends = [solver.run(depth, random, stream=stream, exit=exit, motion=motion, start=start)
                for stream, motion, start in zip(streams, motions, starts, strict=True)]
        runs = Runs(batch, torch.stack([end.logits for end in ends]), torch.stack([end.used for end in ends]),
                    torch.stack([motion.residual for motion in motions]),
                    renoised=lambda answers, number: solver.consistency(answers, random, streams[number]))
        return Answered.of(runs, config.choose, self.answer_cost(depth, config))

    def answer_cost(self, depth: int, config: EvaluationConfig, *, early: bool = False) -> Cost:
        networks = 1 if self.objective.config.guidance == 1 else 2
        num_checks = choice_of(config.choose).num_checks * config.trajectories if config.trajectories > 1 else 0
        checks = self._readings(torch.tensor([check_level(self.objective.noise)], dtype=torch.float64)) * num_checks
        return Cost(self._before, self._solver(depth, networks), runs=config.trajectories, networks=networks,
                    checks=tuple(checks), together=self.objective.config.context != "inject")

    def likelihood_cost(self, depth: int) -> Cost:
        c = self.objective.config
        levels = block_schedule(c.schedule, depth, self.objective.noise, c.block_size, c.order)
        return Cost(self._before, tuple(self._readings(levels[:, 0])))

    def sampled_cost(self, depth: int, num_trajectories: int) -> Cost:
        """Cost of `sampled_losses`: teacher forcing, for which `inject` also evaluates the noised truth."""
        networks = 2 if self.objective.config.context == "inject" else 1
        return Cost(self._before, self._solver(depth, networks), runs=num_trajectories, networks=networks)

    @property
    def _before(self) -> int:
        """Layers of the prelude and, for `concat`, of the clean rows: each block, and the coda without its last layer,
        which only needs keys and values."""
        blocks, c = self.objective.denoiser.clean_layers, self.model
        clean = sum(blocks) + len(blocks) * max(c.num_coda_layers - 1, 0)
        return c.num_prelude_layers + (clean if self.objective.config.context == "concat" else 0)

    def _solver(self, depth: int, networks: int) -> tuple[float, ...]:
        levels = evaluated_levels(self.objective.config, self.objective.noise, depth)
        # If rows have their own levels there is one block, which owns all of them.
        highest = torch.stack([torch.as_tensor(level, dtype=torch.float64).max() for level in levels])
        return tuple(networks * layers for layers in self._readings(highest))

    def _readings(self, levels: Float[Tensor, "readings"]) -> list[float]:
        """Layers of a network evaluation at each level, by the block that owns it."""
        layers, denoiser = self.model.core_layers, self.objective.denoiser
        owners = [0] * len(levels) if denoiser.edges is None else denoiser.owners(levels).tolist()
        return [float(layers[block] + self.model.num_coda_layers) for block in owners]

    def steps(self, batch: Batch, depth: int, random: StepRandom, *, start: str | None = None) -> Iterator[Readout]:
        """The soft estimate and the readout of each network evaluation."""
        table, seen = self.objective.denoiser.table(), []
        Solver(self.objective, batch).run(
            depth, random, start=start,
            watch=lambda step, z, logits, D: seen.append((bridge("soft", logits, table), logits)))
        return iter(seen)

    def steps_elsewhere(self, batch: Batch, depth: int, random: StepRandom, end: Tensor) -> Iterator[Readout]:
        """Steps from other noise, even if the solver starts from zero."""
        return self.steps(batch, depth, random, start="noise")

    def losses(self, rows: Int[Tensor, "batch length_and_one"], depths: list[int],
               random: StepRandom) -> Iterator[tuple[int, Tensor, float]]:
        """The variational bound, with a schedule per depth. Each row sees the earlier ones as in training: the truth,
        noised to its own level."""
        for depth in depths:
            began = now(rows.device)
            losses = bound(self.objective, rows, depth, random)
            yield depth, losses, now(rows.device) - began

    def next_tokens(self, rows: Int[Tensor, "batch length_and_one"], depths: list[int],
                    random: StepRandom) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The bound of each token; the argmax is of the configured solver's last readout."""
        for depth in depths:
            solver = TeacherForced(self.objective, rows)
            likeliest = solver.logits(depth, random, "likeliest").argmax(-1)
            yield depth, bound(self.objective, rows, depth, random), likeliest == solver.y

    def sampled_losses(self, rows: Int[Tensor, "batch length_and_one"], depths: list[int], random: StepRandom,
                       num_trajectories: int) -> Iterator[tuple[int, Tensor, float]]:
        for depth in depths:
            began = now(rows.device)
            solver = TeacherForced(self.objective, rows)
            log_probs = [solver.log_probs(depth, random, f"trajectory{i}") for i in range(num_trajectories)]
            mixture = torch.stack(log_probs).logsumexp(0) - math.log(num_trajectories)
            yield depth, -mixture, now(rows.device) - began

    def main(self, likelihood: Likelihood, depth: int, num_levels: int) -> Tensor:
        """The bound of one pass, at sigma_max (with blocks: of each token without the others of its block)."""
        (_, losses), = likelihood.by_level(1)
        return losses + self.known_at_start

    @property
    def known_at_start(self) -> float:
        return known_at_start(self.objective)

    def levels(self, num: int) -> list[float]:
        """Noise levels evenly spaced in ln sigma, highest first."""
        noise = self.objective.noise
        return torch.logspace(noise.x_max, noise.x_min, num, base=torch.e, dtype=torch.float64).tolist()

    def losses_at(self, batch: Batch, level: float, random: StepRandom) -> Float[Tensor, "batch length"]:
        target = self.objective.denoiser.target(batch.targets)
        z = target + level * random.normal("noise", target.shape[1:])
        return token_losses(self.objective.logits(batch, z, levels_of(z, level)), batch.targets)

    def first_logits(self, batch: Batch, random: StepRandom) -> Float[Tensor, "batch length vocab"]:
        """Logits at sigma_max."""
        target, level = self.objective.denoiser.target(batch.targets), self.objective.noise.sigma_max
        z = target + level * random.normal("noise", target.shape[1:])
        return self.objective.logits(batch, z, torch.full((len(z),), level, dtype=torch.float64))

    def write(self, prompt: Int[Tensor, "batch length"], num_tokens: int, depth: int, way: Writing) -> Tensor:
        writer = DenoiseWriter(self.objective, depth, way.steering, way.padding)
        return one_after_another(writer, prompt, num_tokens, way)

    def hidden(self, batch: Batch, depth: int,
               noise: Callable[[Tensor], Tensor]) -> Float[Tensor, "batch length width"]:
        """The head's input at the highest noise level with z = 0, which carries nothing of the targets."""
        rows, denoiser = rows_of_batch(batch), self.objective.denoiser
        e = self.model.encode(batch.inputs, rows)
        z = e.new_zeros(*e.shape[:2], denoiser.targets.dim)
        sigma = torch.full((len(e),), self.objective.noise.sigma_max, dtype=torch.float64)
        return denoiser.trace(z, sigma, e, rows.having(block=None if denoiser.edges is None else 0))[1]


class Solver:
    """The configured solver of a denoiser on one batch of problems."""

    def __init__(self, objective: Denoise, batch: Batch):
        self.objective = objective
        self.batch = batch
        self.rows: Rows = rows_of_batch(batch)
        self.denoiser: Denoiser = objective.denoiser
        self.config: DenoiseConfig = objective.config
        self.e: Tensor = objective.model.encode(batch.inputs, self.rows)
        self.context: Cache | None = objective.model.make_context(self.e, self.config.context, self.rows)
        self.rows = self.rows.having(context=self.context)

    def run(self, depth: int, random: StepRandom, *, stream: str = "", exit: Exit | None = None,
            watch: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
            motion: Motion | None = None, start: str | None = None) -> EarlyExit:
        """Run `depth` solver steps on the active problems, from `start` in place of `denoise.start` if it is given.
        `watch(step, z, logits, D)` sees each network evaluation, `motion` the changes of the soft estimate."""
        stopping, carry, estimate = EarlyExit(self.batch, exit), None, None
        config = self.config.model_copy(update={"start": start or self.config.start})

        def denoise(z: Tensor, level: float | Tensor) -> Tensor:
            nonlocal carry, estimate
            working = stopping.working
            if not len(working):
                return estimate
            z = only_sought(z.float(), self.batch)
            step, numbers = stopping.steps, stopping.numbers
            uniform = random.uniform(f"{stream}bridge{step}", z.shape[1:2])
            logits, carried = self._read(z, level, stopping, carry)
            soft = bridge("soft", logits, self.denoiser.table())
            new = self.denoiser.estimate(logits, uniform[numbers])
            if motion is not None and stopping.latent is not None:
                motion.take(working, stopping.latent[working], soft)
            stopping.take(logits, soft)
            estimate = _put(estimate, working, new, len(z))
            carry = None if carried is None else _put(carry, working, carried, len(z))
            if watch is not None:
                watch(step, z, logits, new)
            return estimate

        solve(config, self.objective.noise, denoise, depth,
              normal=lambda name: own_normal(random, f"{stream}{name}", self.batch, self.denoiser.targets.dim),
              settling=Settling(lambda: stopping.logits.softmax(-1).amax(-1), self.batch.sought))
        return stopping

    def _read(self, z: Tensor, level: float | Tensor, stopping: EarlyExit,
              carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits of the active problems, and the carry of the step."""
        sigma, working = levels_of(z, level), stopping.working
        if len(working) == len(z):
            return self._guided(z, sigma, self.e, self.rows, carry)
        if self.context is not None:  # its keys and values are those of the whole batch
            logits, carried = self.denoiser.read(z, sigma, self.e, self.rows, carry=carry)
            return logits[working], None if carried is None else carried[working]
        return self._guided(z[working], sigma[stopping.numbers], self.e[working],
                            rows_of_batch(self.batch[working]), None if carry is None else carry[working])

    def _guided(self, z: Tensor, sigma: Tensor, e: Tensor, rows: Rows,
                carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        own = {"carry": carry, "level": self.denoiser.at(z, sigma)}
        logits, carried = self.denoiser.read(z, sigma, e, rows, **own)
        return self.denoiser.guided(logits, z, sigma, e, rows, **own), carried

    def consistency(self, answers: Int[Tensor, "batch length"], random: StepRandom,
                    stream: str) -> Float[Tensor, "batch"]:
        """The denoiser's confidence in an answer on reading it again `NUM_CHECKS` times (`second_readings`): the mean
        log-probability per cell."""
        target, sought = self.denoiser.target(answers), self.batch.sought
        total, times = torch.zeros_like(target[..., 0]), torch.zeros_like(target[..., 0])
        readings = second_readings(self.config, self.objective.noise, sought, NUM_CHECKS,
                                   lambda: own_normal(random, f"{stream}parts", self.batch, 1).squeeze(-1))
        for check, (level, judged) in enumerate(readings):
            sigma = levels_of(target, level)
            eps = own_normal(random, f"{stream}check{check}", self.batch, target.shape[-1])
            z = only_sought(target + to_device(align(sigma, target).float(), target.device) * eps, self.batch)
            log_probs = self.denoiser(z, sigma, self.e, self.rows).log_softmax(-1)
            own = log_probs.gather(-1, answers.unsqueeze(-1)).squeeze(-1)
            total, times = total + torch.where(judged, own, 0.0), times + judged
        return self.batch.mean(total / times.clamp(min=1))


def _put(old: Tensor | None, rows: Tensor, new: Tensor, num: int) -> Tensor:
    """`old` with `new` in the given rows of a batch of `num`."""
    return new if len(rows) == num else old.index_copy(0, rows, new)
