"""Text from a model at any depth, with one cache a loop step or noise level, and how varied that text is.

A denoiser's earlier tokens are shown to the solver as in training: once a token is chosen, its row is noised anew to
the level of each solver step. One forward pass of two rows a step does both: the token just chosen, the one sought.
"""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from looped.diffusion.samplers import SAMPLERS
from looped.diffusion.schedules import schedule
from looped.diffusion.steering import Steering
from looped.errors import UserError
from looped.nn.cache import Cache
from looped.objectives.base import Objective
from looped.objectives.bptt import Unrolled
from looped.objectives.denoise import Denoise
from looped.rng import StepRandom


@torch.no_grad()
def generate(objective: Objective, prompt: Int[Tensor, "batch length"], *, num_tokens: int, depth: int,
             temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
             seed: int = 0) -> Int[Tensor, "batch {num_tokens}"]:
    """Continue each prompt by `num_tokens` tokens with `depth` loop or solver steps a token.

    `temperature`, `top_k` and `top_p` steer the distribution that tokens are drawn from (`Steering`), for a denoiser at
    every noise level. Raises `UserError` for an empty prompt or steering out of range.
    """
    if prompt.shape[1] == 0:
        raise UserError("the prompt has no tokens; give it at least one")
    steering = Steering(temperature, top_k, top_p)
    was_training = objective.training
    objective.eval()
    writer = (DenoiseWriter if isinstance(objective, Denoise) else LoopWriter)(objective, depth, seed, steering)
    new, chosen = prompt, []
    for position in range(num_tokens):
        logits = writer.next_logits(new)
        new = _draw(logits, StepRandom(seed, position, count=len(prompt))).to(prompt.device)
        chosen.append(new)
    objective.train(was_training)
    return torch.cat(chosen, dim=1)


def _draw(logits: Tensor, random: StepRandom) -> Int[Tensor, "batch 1"]:
    probs = torch.softmax(logits.double().cpu(), dim=-1)
    rows = zip(probs, random.per_row("token"), strict=True)
    return torch.stack([torch.multinomial(row, 1, generator=gen) for row, gen in rows])


class LoopWriter:
    """Next-token logits of an unrolled loop; keys and values of each loop step are kept."""

    def __init__(self, objective: Unrolled, depth: int, seed: int, steering: Steering):
        self.model, self.depth, self.seed, self.steering = objective.model, depth, seed, steering
        self.cache, self.length = Cache(), 0

    def next_logits(self, new: Int[Tensor, "batch new"]) -> Tensor:
        """Logits after the rows so far and the `new` ones."""
        start, self.length = self.length, self.length + new.shape[1]
        e = self.model.encode(new, cache=self.cache, start=start)
        noise = None
        if self.model.recurrence.needs_noise:
            noise = StepRandom(self.seed, start, count=len(new), device=new.device).normal("state", e.shape[1:])
        state = self.model.unroll(e, grad=self.depth, noise=noise, cache=self.cache, start=start)
        return self.steering(self.model.decode(state, cache=self.cache.child("coda"), start=start)[:, -1])


class DenoiseWriter:
    """Next-token logits at the last step of a solver; one cache a noise level, or one clean context for all levels."""

    def __init__(self, objective: Denoise, depth: int, seed: int, steering: Steering):
        self.steering = steering
        self.objective, self.denoiser, self.model = objective, objective.denoiser, objective.model
        self.sigmas = schedule(objective.config.schedule, depth, objective.noise)
        self.seed, self.length = seed, 0
        self.cache = Cache()
        self.context: Cache | None = None
        self.last_e: Tensor | None = None

    def next_logits(self, new: Int[Tensor, "batch new"]) -> Tensor:
        """Logits after the rows so far and the `new` ones."""
        start, self.length = self.length, self.length + new.shape[1]
        e = self.model.encode(new, cache=self.cache, start=start)
        self.context = self.model.make_context(e, self.objective.config.context, cache=self.context, start=start)
        random = StepRandom(self.seed, self.length, count=len(new), device=new.device)
        if self.context is not None:
            return self._solve(random, e[:, -1:], self.length - 1, {"context": self.context})
        # Rows whose target is known by now: those of all new tokens but the first, and the row that sought the first.
        known, pending_e = new, e if self.last_e is None else torch.cat([self.last_e, e], dim=1)
        if self.last_e is None:
            known = new[:, 1:]
        self.last_e = e[:, -1:]
        return self._solve(random, pending_e, self.length - pending_e.shape[1], {}, known)

    def _solve(self, random: StepRandom, e: Tensor, start: int, surroundings: dict,
               known: Tensor | None = None) -> Tensor:
        """Solve for the last row of `e`; the rows before it hold the `known` tokens."""
        target = self.denoiser.target(known) if known is not None and known.shape[1] else None
        eps = random.normal("teacher", target.shape[1:]) if target is not None else None
        dim, seen, logits = self.denoiser.in_proj.in_features, set(), None
        calls = itertools.count()  # each call of a sampled bridge draws anew

        def denoise(z: Tensor, sigma) -> Tensor:
            nonlocal logits
            level = float(sigma)
            sigma = torch.full((len(z),), level, dtype=torch.float64, device=z.device)
            rows, rows_e, rows_start, options = z.float(), e[:, -1:], start + e.shape[1] - 1, dict(surroundings)
            if self.context is None:
                options["cache"] = self.cache.child("level", level)
                if target is not None and level not in seen:  # a solver may come back to a level: commit once
                    rows, rows_e, rows_start = torch.cat([target + level * eps, rows], dim=1), e, start
            seen.add(level)
            bridge = random.lockstep(f"bridge{next(calls)}")
            D, all_logits = self.denoiser.denoise(rows, sigma, rows_e, start=rows_start, steer=self.steering,
                                                  generator=bridge, **options)
            if self.context is None:
                options["cache"].truncate(start + e.shape[1] - 1)  # the sought row is not known yet
            logits = all_logits[:, -1]
            return D[:, -1:]

        z = self.sigmas[0].float() * random.normal("start", (1, dim))
        SAMPLERS[self.objective.config.solver](denoise, z, self.sigmas,
                                               random=lambda step: random.normal(f"step{step}", (1, dim)))
        return logits


def distinct(texts: Sequence[Sequence], n: int) -> float:
    """Share of different n-grams among all n-grams of all texts (Li et al. 2016); 0 where there are none."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
