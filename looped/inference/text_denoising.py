"""A denoiser on text: the variational bound of its solver, teacher-forced solver trajectories, and generation.

For n steps the bound is that of the n-step stochastic solver (Ho et al. 2020, equation 5, over tokens). Along the chain
from noise to the truth, z_1 at sigma_max down to z_n,

    -log p(y) <= |y|^2 / (2 sigma_max^2) + sum_t log [q(z_{t+1} | z_t, y) / sum_v p(v | z_t) q(z_{t+1} | z_t, y_v)]
                 - log p(y | z_n)

where q is the exact step towards a known row, so p is the ancestral solver with the sampled bridge. For an exact
denoiser the sum telescopes: the bound is -log p(y | z_1) at any depth, without variance. Any change of the bound with
depth is therefore due to the network alone.

In generation the solver sees earlier tokens as in training. `inject` noises the row of a chosen token to the level of
each solver step; one forward pass of two rows covers the token just chosen and the one to predict. `concat` and
`context` keep one clean cache at any depth, and solve for a block of tokens at once.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from looped.data.batch import Batch
from looped.devices import to_device, widest
from looped.diffusion.denoiser import Denoiser, Level, Levels, Noisy, Trajectory, levels_of
from looped.diffusion.sampling_params import SamplingParams
from looped.diffusion.schedules import block_schedule
from looped.diffusion.solver_from_config import solve, start_of
from looped.inference.padding import Padding
from looped.models.language import LanguageModel
from looped.nn.cache import Cache
from looped.nn.masks import CleanNoisy, Full, SameDocument
from looped.nn.rows import Rows
from looped.objectives.base import token_losses
from looped.objectives.denoise import Denoise
from looped.objectives.leaks import check_cached
from looped.rng import StepRandom
from looped.tensor_types import Float, Float64, Int

Tokens = Int[Tensor, "num length_and_one"]


def known_at_start(objective: Denoise) -> float:
    """|y|^2 / (2 sigma_max^2), in nats/token: what z says of a token at sigma_max, where no solver may know anything;
    the first term of the bound, and of any loss of a network that saw such a z."""
    return (objective.denoiser.targets.row_norm / objective.noise.sigma_max) ** 2 / 2


def bound(objective: Denoise, rows: Tokens, depth: int, random: StepRandom) -> Float[Tensor, "batch length"]:
    denoiser, batch = objective.denoiser, objective.ask(rows)
    y, (e, around) = batch.targets, objective.encoded(batch)
    target, table = denoiser.target(y), denoiser.table()
    levels = rows_of_blocks(objective, depth, y.shape[1])  # n L
    z = target + to_device(levels[0].float().unsqueeze(-1), target.device) * random.normal("chain0", target.shape[1:])
    losses = torch.full(y.shape, known_at_start(objective), device=y.device)
    walk = Trajectory(denoiser)

    def logits_at(z: Tensor, level: Tensor) -> Tensor:
        return walk(z, levels_of(z, level), e, around)

    for step, (sigma, lower) in enumerate(itertools.pairwise(levels)):
        # q(z' | z, y): mean keep z + (1 - keep) y, variance lower^2 (1 - keep), with keep = (lower / sigma)^2.
        keep, lower = to_device(torch.stack([(lower / sigma) ** 2, lower]).float().unsqueeze(-1), target.device)
        noise = random.normal(f"chain{step + 1}", target.shape[1:])
        moved = (1 - keep) * target + lower * (1 - keep).sqrt() * noise  # z' - keep z
        # All rows of the table have one norm, so only the inner product in ln q(z' | z, y_v) depends on v.
        log_q = (moved / lower**2) @ table.T
        losses = losses + log_q.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        losses = losses - torch.logsumexp(torch.log_softmax(logits_at(z, sigma), -1) + log_q, -1)
        z = keep * z + moved
    return losses + token_losses(logits_at(z, levels[-1]), y)


def rows_of_blocks(objective: Denoise, depth: int, length: int) -> Float64[Tensor, "steps length"]:
    """The noise level of every row of a sequence at each of `depth` network evaluations."""
    config = objective.config
    levels = block_schedule(config.schedule, depth, objective.noise, config.block_size, config.order)
    return levels.repeat(1, length // config.block_size)


class TeacherForced:
    """Solver trajectories for every position of known sequences at once.

    Each row attends to itself and to the true earlier tokens, noised to the level of the step as in training; never to
    its own answer.
    """

    def __init__(self, objective: Denoise, rows: Tokens):
        self.objective = objective
        self.denoiser: Denoiser = objective.denoiser
        self.batch: Batch = objective.ask(rows)
        self.y: Tensor = self.batch.targets
        self.e: Tensor
        self.around: Rows
        self.e, self.around = objective.encoded(self.batch)
        self.target: Noisy = self.denoiser.target(self.y)

    def log_probs(self, num_steps: int, random: StepRandom, stream: str) -> Float[Tensor, "batch length"]:
        """Log-probability of the true tokens at the last readout of a `num_steps`-step solve from pure noise."""
        return -token_losses(self.logits(num_steps, random, stream), self.y)

    def logits(self, num_steps: int, random: StepRandom, stream: str) -> Float[Tensor, "batch length vocab"]:
        """Logits of the last readout."""
        config, logits = self.objective.config, None
        calls, walk = itertools.count(), Trajectory(self.denoiser)  # each call of a sampled bridge has its own draws
        eps = random.normal(f"{stream} teacher", self.target.shape[1:])

        def denoise(z: Tensor, sigma) -> Tensor:
            nonlocal logits
            sigma = levels_of(z, sigma)
            logits = walk(z.float(), sigma, self.e, self._rows(sigma, eps))
            return self.denoiser.estimate(logits, random.uniform(f"{stream} bridge{next(calls)}", self.y.shape[1:]))

        solve(config, self.objective.noise, denoise, num_steps,
              normal=lambda name: random.normal(f"{stream} {name}", self.target.shape[1:]))
        return logits

    def first_logits(self, random: StepRandom, stream: str) -> Float[Tensor, "batch length vocab"]:
        """Logits at sigma_max: the distribution of each next token, where no step has drawn a part of it."""
        shape, noise = self.target.shape[1:], self.objective.noise
        z = start_of(self.objective.config, noise, lambda name: random.normal(f"{stream} {name}", shape))
        sigma = levels_of(z, noise.sigma_max)
        rows = self._rows(sigma, random.normal(f"{stream} teacher", shape))
        return Trajectory(self.denoiser)(z.float(), sigma, self.e, rows)

    def _rows(self, sigma: Tensor, eps: Tensor) -> Rows:
        """Attention inputs of the solved rows besides themselves: clean rows, or the noised truth of strictly earlier
        rows (its row i holds token i + 1, which row i itself must not see)."""
        if self.around.context is not None:
            return self.around
        teacher, documents = Cache(), self.batch.documents
        noisy = self.target + to_device(sigma.float()[:, None, None], eps.device) * eps
        self.denoiser(noisy, sigma, self.e, self.around.having(cache=teacher))
        if documents is None:
            return self.around.having(context=teacher, strict=True)
        mask = CleanNoisy(documents.shape[1], strict=True) & SameDocument(documents)
        return self.around.having(context=teacher, mask=mask)


class DenoiseWriter:
    """Logits of the next block at the last step of a solver; one cache per noise level, or one clean context. Raises
    UserError for a custom core that mixes rows without its cache."""

    def __init__(self, objective: Denoise, depth: int, steering: SamplingParams, padding: Padding):
        check_cached(objective)
        self.steering = steering
        self.padding = padding
        self.objective = objective
        self.denoiser: Denoiser = objective.denoiser
        self.model: LanguageModel = objective.model
        self.block: int = objective.config.block_size
        self.depth = depth
        self.levels: Levels = Levels(self.denoiser)
        self.normals: Ahead = Ahead()
        self.uniforms: Ahead = Ahead()
        self.cache: Cache = Cache()
        self.width: int = 0
        self.context: Cache | None = None
        self.last_e: Tensor | None = None

    def next_logits(self, new: Int[Tensor, "batch new"], random: StepRandom) -> Tensor:
        """Logits (B, k, V) of the block after the columns so far and the `new` ones."""
        first, self.width = self.width, self.width + new.shape[1]
        rows = self.padding.rows(first, mask=self.padding.mask(self.width))
        e = self.model.encode(new, rows.having(cache=self.cache))
        self.context = self.model.make_context(e, self.objective.config.context, rows.having(context=self.context))
        logits_at = self._on_context(e) if self.context is not None else self._on_noisy_rows(e, new, random)
        return self._solve(logits_at, random)

    def _on_context(self, e: Tensor):
        """(z, level) -> logits of the next block, which attends to the clean context and to itself."""
        whole = Full() if self.block > 1 else None
        mask = self.padding.mask(self.width + self.block, causal=False) or whole
        rows = self.padding.rows(self.width - 1, mask=mask, context=self.context)
        walk = Trajectory(self.denoiser)

        def logits_at(z: Tensor, level: Level) -> Tensor:
            return walk(z, level.sigma, e[:, -1:], rows, steer=self.steering, level=level)

        return logits_at

    def _on_noisy_rows(self, e: Tensor, new: Tensor, random: StepRandom):
        """(z, level) -> logits of the next row. Rows of known tokens (all of `new`; for a prompt all but the first) are
        noised to each level at its first evaluation, and stay in that level's cache."""
        known = new[:, 1:] if self.last_e is None else new
        held_e = e if self.last_e is None else torch.cat([self.last_e, e], dim=1)
        self.last_e = e[:, -1:]
        first = self.width - held_e.shape[1]
        target = self.denoiser.target(known)
        eps = self.padding.normal(random, "teacher", first, self.width - 1, target.shape[-1])
        mask, seen = self.padding.causal(self.width), set()

        def logits_at(z: Tensor, level: Level) -> Tensor:
            noisy, noisy_e, column, sigma = z, held_e[:, -1:], self.width - 1, level.sigma[0].item()
            if sigma not in seen:  # a solver may come back to a level: commit once
                noisy, noisy_e, column = torch.cat([target + sigma * eps, z], dim=1), held_e, first
            seen.add(sigma)
            cache = self.cache.child("level", sigma)
            rows = self.padding.rows(column, mask=mask, cache=cache)
            logits, _ = self.denoiser.read(noisy, level.sigma, noisy_e, rows, steer=self.steering, level=level)
            cache.truncate(self.width - 1)  # the token of the last row is not known yet
            return logits[:, -1:]

        return logits_at

    def _solve(self, logits_at, random: StepRandom) -> Tensor:
        """The last logits of a solve from pure noise."""
        config, logits, calls = self.objective.config, None, itertools.count()
        shape, device = (self.block, self.denoiser.targets.dim), random.device
        normal = self.normals.of(lambda stream: random.drawn(stream, shape), device)
        uniform = self.uniforms.of(lambda stream: random.uniform(stream, shape[:1]).to(widest(device)), device)

        def denoise(z: Tensor, sigma: float | Tensor) -> Tensor:
            nonlocal logits
            logits = logits_at(z.float(), self.levels(z, sigma))
            drawn = uniform(f"bridge{next(calls)}") if config.bridge == "sampled" else None  # each call has its own
            return self.denoiser.estimate(logits, drawn)

        solve(config, self.objective.noise, denoise, self.depth, normal=normal)
        return logits


class Ahead:
    """Random draws for the solves of a text: what the solve before has asked for is drawn at once, in one copy to the
    device."""

    def __init__(self) -> None:
        self.streams: list[str] = []

    def of(self, draw: Callable[[str], Tensor], device: torch.device) -> Callable[[str], Tensor]:
        """The draws of one solve by stream; `draw` makes them on the host."""
        made: dict[str, Tensor] = {}
        if self.streams:
            together = to_device(torch.stack([draw(stream) for stream in self.streams]), device)
            made = dict(zip(self.streams, together, strict=True))

        def drawn(stream: str) -> Tensor:
            if stream not in made:
                self.streams.append(stream)
                made[stream] = to_device(draw(stream), device)
            return made[stream]

        return drawn
