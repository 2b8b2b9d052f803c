"""Held-out likelihood: nats a token at every asked depth, and the denoiser's loss by noise level.

Loops are unrolled once to the deepest depth and read out on the way. Denoisers run their solver under teacher forcing:
the row that is solved for attends to the true earlier tokens noised to the level of the step, as in training, and to
itself; never to its own answer.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from looped.diffusion.noise import Noise
from looped.diffusion.samplers import SAMPLERS
from looped.diffusion.schedules import schedule
from looped.nn.cache import Cache
from looped.objectives.base import Objective, token_losses
from looped.objectives.bptt import Unrolled
from looped.objectives.denoise import Denoise
from looped.rng import StepRandom

Tokens = Int[Tensor, "num length+1"]


@dataclass(frozen=True)
class DepthLosses:
    """`losses`: mean nats a token of each held-out sequence at one depth. `seconds`: all sequences, at this depth."""

    depth: int
    losses: Float[Tensor, "num"]
    seconds: float


@torch.no_grad()
def losses_by_depth(objective: Objective, tokens: Tokens, depths: Sequence[int], *, seed: int = 0, batch_size: int = 16,
                    num_trajectories: int = 4) -> list[DepthLosses]:
    """Nats a token of every sequence at every depth, depths ascending. The objective is left in the mode it came in."""
    depths = sorted(set(depths))
    totals = {depth: ([], []) for depth in depths}
    was_training = objective.training
    objective.eval()
    for start in range(0, len(tokens), batch_size):
        rows = tokens[start : start + batch_size]
        random = StepRandom(seed, 0, start=start, count=len(rows), total=len(tokens), device=rows.device)
        if isinstance(objective, Denoise):
            results = _denoise_rows(objective, rows, depths, random, num_trajectories)
        else:
            results = _loop_rows(objective, rows, depths, random)
        for depth, losses, seconds in results:
            totals[depth][0].append(losses.mean(1).double().cpu())
            totals[depth][1].append(seconds)
    objective.train(was_training)
    return [DepthLosses(depth, torch.cat(losses), sum(seconds)) for depth, (losses, seconds) in totals.items()]


def _loop_rows(objective: Unrolled, rows: Tokens, depths: list[int], random: StepRandom) -> list[tuple]:
    """One unroll; the time at a depth counts the loop up to there and one readout."""
    model, (x, y) = objective.model, (rows[:, :-1], rows[:, 1:])
    began = time.perf_counter()
    e = model.encode(x)
    noise = random.normal("state", e.shape[1:]) if model.recurrence.needs_noise else None
    results, reading = [], 0.0

    def read_out(index: int, state: Tensor) -> None:
        nonlocal reading
        if index + 1 in depths:
            start = time.perf_counter()
            losses = token_losses(model.decode(state), y)
            own = time.perf_counter() - start
            results.append((index + 1, losses, start - began - reading + own))
            reading += own

    model.unroll(e, grad=depths[-1], noise=noise, callback=read_out)
    return results


def _denoise_rows(objective: Denoise, rows: Tokens, depths: list[int], random: StepRandom,
                  num_trajectories: int) -> Iterator[tuple]:
    """A schedule for each depth. The predictive distribution of a solver is the mixture of its trajectories'
    readouts, so the loss is that of their mean; with few trajectories it is an upper bound."""
    for depth in depths:
        began = time.perf_counter()
        solver = TeacherForced(objective, rows)
        log_probs = [solver.log_probs(depth, random, f"trajectory{i}") for i in range(num_trajectories)]
        mixture = torch.stack(log_probs).logsumexp(0) - torch.tensor(float(num_trajectories)).log()
        yield depth, -mixture, time.perf_counter() - began


class TeacherForced:
    """Solver trajectories for every position of known sequences at once."""

    def __init__(self, objective: Denoise, rows: Tokens):
        self.objective, self.denoiser = objective, objective.denoiser
        self.y = rows[:, 1:]
        self.e = objective.model.encode(rows[:, :-1])
        self.context = objective.model.make_context(self.e, objective.config.context)
        self.target = self.denoiser.target(self.y)

    def log_probs(self, num_steps: int, random: StepRandom, stream: str) -> Float[Tensor, "batch length"]:
        """Log-probability of the true tokens at the last readout of a `num_steps`-step solve from pure noise."""
        config, logits = self.objective.config, None
        calls = itertools.count()  # each call of a sampled bridge draws anew
        eps = random.normal(f"{stream} teacher", self.target.shape[1:])

        def denoise(z: Tensor, sigma) -> Tensor:
            nonlocal logits
            sigma = torch.as_tensor(sigma, dtype=torch.float64, device=z.device).expand(len(z))
            D, logits = self.denoiser.denoise(z.float(), sigma, self.e, **self._surroundings(sigma, eps),
                                              generator=random.lockstep(f"{stream} bridge{next(calls)}"))
            return D

        sigmas = schedule(config.schedule, num_steps, self.objective.noise)
        z = sigmas[0].float() * random.normal(stream, self.target.shape[1:])
        SAMPLERS[config.solver](denoise, z, sigmas,
                                random=lambda step: random.normal(f"{stream} step{step}", self.target.shape[1:]))
        return -token_losses(logits, self.y)

    def _surroundings(self, sigma: Tensor, eps: Tensor) -> dict:
        """What the solved rows attend to besides themselves: clean rows, or the noised truth of strictly earlier ones
        (row i of it holds token i + 1, which row i itself must not see)."""
        if self.context is not None:
            return {"context": self.context}
        teacher = Cache()
        self.denoiser(self.target + sigma.float()[:, None, None] * eps, sigma, self.e, cache=teacher)
        return {"context": teacher, "strict": True}


@torch.no_grad()
def losses_by_sigma(objective: Denoise, tokens: Tokens, *, num_levels: int = 12, seed: int = 0,
                    batch_size: int = 16) -> list[tuple[float, Float[Tensor, "num"]]]:
    """(sigma, nats a token of every sequence) at levels evenly spaced in ln sigma, highest first, in one pass each."""
    noise: Noise = objective.noise
    levels = torch.logspace(noise.x_max, noise.x_min, num_levels, base=torch.e, dtype=torch.float64)
    was_training = objective.training
    objective.eval()
    results = []
    for level in levels.tolist():
        losses = []
        for start in range(0, len(tokens), batch_size):
            rows = tokens[start : start + batch_size]
            random = StepRandom(seed, 0, start=start, count=len(rows), total=len(tokens), device=rows.device)
            target = objective.denoiser.target(rows[:, 1:])
            z = target + level * random.normal("noise", target.shape[1:])
            sigma = torch.full((len(rows),), level, dtype=torch.float64, device=rows.device)
            losses.append(token_losses(objective.logits(rows[:, :-1], z, sigma), rows[:, 1:]).mean(1).double().cpu())
        results.append((level, torch.cat(losses)))
    objective.train(was_training)
    return results
