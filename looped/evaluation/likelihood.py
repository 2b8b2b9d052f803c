"""Held-out likelihood: nats a token at every asked depth, and the denoiser's loss by noise level.

Loops are unrolled once to the deepest depth and read out on the way. For a denoiser of n steps the figure is the
variational bound of its n-step stochastic solver (Ho et al. 2020, equation 5, over tokens). Along the chain from noise
to the truth, z_1 at sigma_max down to z_n,

    -log p(y) <= |y|^2 / (2 sigma_max^2) + sum_t log [q(z_{t+1} | z_t, y) / sum_v p(v | z_t) q(z_{t+1} | z_t, y_v)]
                 - log p(y | z_n)

where q is the exact step towards a known row, so p is the ancestral solver with the sampled bridge. For an exact
denoiser the sum telescopes: the bound is -log p(y | z_1) at any depth, without variance. What it gains or loses with
depth is therefore the network's doing alone.

For masked diffusion it is the bound of n unmasking steps (`masked_bound`).

`losses_by_solver` measures the configured solver as it is, by sampling it: the readouts of many trajectories, averaged.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from looped.devices import now
from looped.diffusion.denoiser import Walk, levels_of
from looped.diffusion.noise import Noise
from looped.diffusion.schedules import block_schedule
from looped.diffusion.solve import solve
from looped.errors import UserError
from looped.evaluation.masked_bound import bound, step_bounds
from looped.evaluation.texts import per_token
from looped.nn.bias import CleanNoisy, SameDocument
from looped.nn.cache import Cache
from looped.nn.checks import depths_of, ids_of, whole_number
from looped.nn.rows import Rows
from looped.objectives.base import Objective, evaluating, require_objective, rows_of_batch, token_losses
from looped.objectives.bptt import Unrolled
from looped.objectives.denoise import Denoise
from looped.objectives.masked import Masked
from looped.rng import StepRandom

Tokens = Int[Tensor, "num length_and_one"]


@dataclass(frozen=True)
class DepthLosses:
    """`losses`: mean nats a token of each held-out sequence at one depth; where some have fewer tokens that are sought,
    figures whose mean is that over all tokens. `seconds`: all sequences, at this depth. `share`: that of the tokens
    which are sought."""

    depth: int
    losses: Float[Tensor, "num"]
    seconds: float
    share: float = 1.0


@torch.no_grad()
def losses_by_depth(objective: Objective, tokens: Tokens, depths: Sequence[int], *, seed: int = 0,
                    batch_size: int = 16) -> list[DepthLosses]:
    """Nats a token of every sequence at every depth, depths ascending; for denoisers and masked diffusion the
    variational bound. The objective is left in the mode it came in."""
    measure = step_bounds if isinstance(objective, Masked) else _measure_of(objective)
    return _over_batches(objective, tokens, depths, measure, seed, batch_size)


@torch.no_grad()
def masked_bounds(objective: Masked, tokens: Tokens, num_levels: int, *, seed: int = 0,
                  batch_size: int = 16) -> Float[Tensor, "num"]:
    """The bound of masked diffusion with ever more steps, nats a token of every sequence, each read at `num_levels`
    levels."""
    def measure(objective, rows, depths, random):
        return [(num_levels, bound(objective, rows, num_levels, random).unsqueeze(1), 0.0)]

    return _over_batches(objective, tokens, [num_levels], measure, seed, batch_size)[0].losses


@torch.no_grad()
def losses_by_solver(objective: Denoise, tokens: Tokens, depths: Sequence[int], *, num_trajectories: int, seed: int = 0,
                     batch_size: int = 16) -> list[DepthLosses]:
    """Nats a token under the mean readout of `num_trajectories` runs of the configured solver.

    An upper bound that falls as trajectories are added, and slowly where a readout is nearly certain: with k of them a
    token of probability far below 1/k is hardly ever hit.
    """
    def measure(objective, rows, depths, random):
        return _solver_rows(objective, rows, depths, random, num_trajectories)

    return _over_batches(objective, tokens, depths, measure, seed, batch_size)


@torch.no_grad()
def main_losses(objective: Objective, tokens: Tokens, depth: int, *, seed: int = 0, batch_size: int = 16,
                num_levels: int = 32) -> Float[Tensor, "num"]:
    """The one figure a sequence that all objectives have, nats a token as a next-token predictor: of a denoiser the
    cross-entropy at sigma_max, in one pass (of blocks: of each token without the others of its block); of a loop the
    loss at `depth`; of masked diffusion, which predicts no next token, the bound over `num_levels` levels."""
    if isinstance(objective, Masked):
        return masked_bounds(objective, tokens, num_levels, seed=seed, batch_size=batch_size)
    if isinstance(objective, Denoise):
        (_, losses), = losses_by_sigma(objective, tokens, num_levels=1, seed=seed, batch_size=batch_size)
        return losses
    return losses_by_depth(objective, tokens, [depth], seed=seed, batch_size=batch_size)[0].losses


@torch.no_grad()
def next_token_losses(objective: Objective, rows: Tokens, depth: int, *,
                      seed: int = 0) -> Float[Tensor, "num length"]:
    """Nats of every token of `rows` but the first at one depth; for denoisers the variational bound. Raises UserError
    for masked diffusion, whose bound is one of whole texts."""
    measure, rows = _measure_of(objective), _sequences(objective, rows)
    random = StepRandom(seed, 0, count=len(rows), device=rows.device)
    with evaluating(objective):
        (_, losses, _), = measure(objective, rows, depths_of([depth]), random)
    return losses


def _sequences(objective: Objective, tokens: Tokens) -> Tokens:
    """Sequences to be read. Raises UserError for what is no objective over token ids, or for other ids than its own."""
    require_objective(objective)
    if not hasattr(objective.model, "vocab_size"):
        raise UserError(f"nats/token are of text, and this objective reads none; it is over a "
                        f"{type(objective.model).__name__}")
    return ids_of(tokens, objective.model.vocab_size, least_length=2)


def _measure_of(objective: Objective) -> Callable:
    if isinstance(objective, Masked):
        raise UserError("objective masked gives a whole text its bound and no token its own loss, so it can neither "
                        "judge samples nor be a twin; choose a run of --objective ar")
    return _bound_rows if isinstance(objective, Denoise) else _loop_rows


def _over_batches(objective: Objective, tokens: Tokens, depths: Sequence[int], measure: Callable, seed: int,
                  batch_size: int) -> list[DepthLosses]:
    tokens, depths = _sequences(objective, tokens), depths_of(depths)
    batch_size = whole_number("batch_size", batch_size, 1)
    totals = {depth: ([], []) for depth in depths}
    counts = []
    with evaluating(objective):
        for start in range(0, len(tokens), batch_size):
            rows = tokens[start : start + batch_size]
            random = StepRandom(seed, 0, start=start, count=len(rows), total=len(tokens), device=rows.device)
            batch = objective.ask(rows)
            counts.append(batch.sought.sum(1).cpu())
            for depth, losses, seconds in measure(objective, rows, depths, random):
                totals[depth][0].append(batch.mean(losses).cpu().double())
                totals[depth][1].append(seconds)
    sought = torch.cat(counts)
    share = sought.sum().item() / (len(tokens) * (tokens.shape[1] - 1))
    return [DepthLosses(depth, _a_token(torch.cat(losses), sought), sum(seconds), share)
            for depth, (losses, seconds) in totals.items()]


def _a_token(means: Float64[Tensor, "num"], counts: Int[Tensor, "num"]) -> Float64[Tensor, "num"]:
    """Means of sequences, as they are where all have as many tokens; else weighed by the number of these."""
    return means if bool((counts == counts[0]).all()) else per_token(means * counts, counts)


def _loop_rows(objective: Unrolled, rows: Tokens, depths: list[int], random: StepRandom) -> list[tuple]:
    """One unroll; the time at a depth counts the loop up to there and one readout."""
    model, batch = objective.model, objective.ask(rows)
    around = rows_of_batch(batch)
    began = now(rows.device)
    e = model.encode(batch.inputs, around)
    noise = random.normal("state", e.shape[1:]) if model.recurrence.needs_noise else None
    results, reading = [], 0.0

    def read_out(index: int, state: Tensor) -> None:
        nonlocal reading
        if index + 1 in depths:
            start = now(rows.device)
            losses = token_losses(model.decode(state, around), batch.targets)
            own = now(rows.device) - start
            results.append((index + 1, losses, start - began - reading + own))
            reading += own

    model.unroll(e, around, grad=depths[-1], noise=noise, callback=read_out)
    return results


def _bound_rows(objective: Denoise, rows: Tokens, depths: list[int], random: StepRandom) -> Iterator[tuple]:
    """A schedule for each depth. Each row sees the earlier ones as in training: the truth, noised to its own level."""
    for depth in depths:
        began = now(rows.device)
        losses = _bound(objective, rows, depth, random)
        yield depth, losses, now(rows.device) - began


def _bound(objective: Denoise, rows: Tokens, depth: int, random: StepRandom) -> Float[Tensor, "batch length"]:
    denoiser, batch = objective.denoiser, objective.ask(rows)
    y, (e, around) = batch.targets, objective.encoded(batch)
    target, table = denoiser.target(y), denoiser.table()
    levels = _rows_of_blocks(objective, depth, y.shape[1])  # n L
    z = target + levels[0].float().unsqueeze(-1).to(target.device) * random.normal("chain0", target.shape[1:])
    losses = torch.full(y.shape, (denoiser.targets.row_norm / objective.noise.sigma_max) ** 2 / 2, device=y.device)
    walk = Walk(denoiser)

    def logits_at(z: Tensor, level: Tensor) -> Tensor:
        return walk(z, levels_of(z, level), e, around)

    for step, (sigma, lower) in enumerate(itertools.pairwise(levels)):
        # q(z' | z, y): mean keep z + (1 - keep) y, variance lower^2 (1 - keep), with keep = (lower / sigma)^2.
        keep, lower = (each.float().unsqueeze(-1).to(target.device) for each in ((lower / sigma) ** 2, lower))
        noise = random.normal(f"chain{step + 1}", target.shape[1:])
        moved = (1 - keep) * target + lower * (1 - keep).sqrt() * noise  # z' - keep z
        # All rows of the table have one norm, so of ln q(z' | z, y_v) only the inner product depends on v.
        log_q = (moved / lower**2) @ table.T
        losses = losses + log_q.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        losses = losses - torch.logsumexp(torch.log_softmax(logits_at(z, sigma), -1) + log_q, -1)
        z = keep * z + moved
    return losses + token_losses(logits_at(z, levels[-1]), y)


def _rows_of_blocks(objective: Denoise, depth: int, length: int) -> Float64[Tensor, "steps length"]:
    """The level of every row of a sequence at each of `depth` readings."""
    config = objective.config
    levels = block_schedule(config.schedule, depth, objective.noise, config.block_size, config.order)
    return levels.repeat(1, length // config.block_size)


def _solver_rows(objective: Denoise, rows: Tokens, depths: list[int], random: StepRandom,
                 num_trajectories: int) -> Iterator[tuple]:
    for depth in depths:
        began = now(rows.device)
        solver = TeacherForced(objective, rows)
        log_probs = [solver.log_probs(depth, random, f"trajectory{i}") for i in range(num_trajectories)]
        mixture = torch.stack(log_probs).logsumexp(0) - math.log(num_trajectories)
        yield depth, -mixture, now(rows.device) - began


class TeacherForced:
    """Solver trajectories for every position of known sequences at once.

    The row that is solved for attends to the true earlier tokens noised to the level of the step, as in training, and
    to itself; never to its own answer.
    """

    def __init__(self, objective: Denoise, rows: Tokens):
        self.objective, self.denoiser = objective, objective.denoiser
        self.batch = objective.ask(rows)
        self.y = self.batch.targets
        self.e, self.around = objective.encoded(self.batch)
        self.target = self.denoiser.target(self.y)

    def log_probs(self, num_steps: int, random: StepRandom, stream: str) -> Float[Tensor, "batch length"]:
        """Log-probability of the true tokens at the last readout of a `num_steps`-step solve from pure noise."""
        config, logits = self.objective.config, None
        calls, walk = itertools.count(), Walk(self.denoiser)  # each call of a sampled bridge draws anew
        eps = random.normal(f"{stream} teacher", self.target.shape[1:])

        def denoise(z: Tensor, sigma) -> Tensor:
            nonlocal logits
            sigma = levels_of(z, sigma)
            logits = walk(z.float(), sigma, self.e, self._rows(sigma, eps))
            return self.denoiser.estimate(logits, random.uniform(f"{stream} bridge{next(calls)}", self.y.shape[1:]))

        solve(config, self.objective.noise, denoise, num_steps,
              normal=lambda name: random.normal(f"{stream} {name}", self.target.shape[1:]))
        return -token_losses(logits, self.y)

    def _rows(self, sigma: Tensor, eps: Tensor) -> Rows:
        """What the solved rows attend to besides themselves: clean rows, or the noised truth of strictly earlier ones
        (row i of it holds token i + 1, which row i itself must not see)."""
        if self.around.context is not None:
            return self.around
        teacher, documents = Cache(), self.batch.documents
        noisy = self.target + sigma.float()[:, None, None].to(eps.device) * eps
        self.denoiser(noisy, sigma, self.e, self.around.having(cache=teacher))
        if documents is None:
            return self.around.having(context=teacher, strict=True)
        mask = CleanNoisy(documents.shape[1], strict=True) & SameDocument(documents)
        return self.around.having(context=teacher, mask=mask)


@torch.no_grad()
def losses_by_sigma(objective: Denoise, tokens: Tokens, *, num_levels: int = 12, seed: int = 0,
                    batch_size: int = 16) -> list[tuple[float, Float[Tensor, "num"]]]:
    """(sigma, nats a token of every sequence) at levels evenly spaced in ln sigma, highest first, in one pass each."""
    tokens = _sequences(objective, tokens)
    num_levels, batch_size = whole_number("num_levels", num_levels, 1), whole_number("batch_size", batch_size, 1)
    noise: Noise = objective.noise
    levels = torch.logspace(noise.x_max, noise.x_min, num_levels, base=torch.e, dtype=torch.float64)
    results = []
    with evaluating(objective):
        for level in levels.tolist():
            losses, counts = [], []
            for start in range(0, len(tokens), batch_size):
                rows = tokens[start : start + batch_size]
                random = StepRandom(seed, 0, start=start, count=len(rows), total=len(tokens), device=rows.device)
                batch = objective.ask(rows)
                target = objective.denoiser.target(batch.targets)
                z = target + level * random.normal("noise", target.shape[1:])
                found = token_losses(objective.logits(batch, z, levels_of(z, level)), batch.targets)
                losses.append(batch.mean(found).cpu().double())
                counts.append(batch.sought.sum(1).cpu())
            results.append((level, _a_token(torch.cat(losses), torch.cat(counts))))
    return results
