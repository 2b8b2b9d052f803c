"""Held-out likelihood: nats/token at every asked depth, and the denoiser's loss by noise level.

Loops are unrolled once to the deepest depth and read out on the way. For a denoiser of n steps the figure is the
variational bound of its n-step stochastic solver (`looped.inference.denoised_text`), for masked diffusion that of n
unmasking steps (`looped.inference.unmask`). `losses_by_solver` measures the configured solver as it is, by sampling it:
the readouts of many trajectories, averaged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from looped.errors import UserError
from looped.inference.rollout import Rollout, rollout_of
from looped.inference.texts import per_token
from looped.nn.checks import depths_of, ids_of, whole_number
from looped.objectives.base import Objective, evaluating, require_objective
from looped.rng import StepRandom

Tokens = Int[Tensor, "num length_and_one"]


@dataclass(frozen=True)
class DepthLosses:
    """`losses`: mean nats/token of each held-out sequence at one depth; where some have fewer tokens that are sought,
    figures whose mean is that over all tokens. `seconds`: all sequences, at this depth. `share`: that of the tokens
    which are sought."""

    depth: int
    losses: Float[Tensor, "num"]
    seconds: float
    share: float = 1.0


class Likelihood:
    """Figures of every one of some sequences, read in batches; draws depend on the number of a sequence alone. The
    objective is left in the mode it came in. Raises UserError for what is no objective over token ids, or for other ids
    than its own."""

    def __init__(self, objective: Objective, tokens: Tokens, *, seed: int = 0, batch_size: int = 16):
        self.objective = objective
        self.tokens: Tokens = _sequences(objective, tokens)
        self.seed = seed
        self.batch_size: int = whole_number("batch_size", batch_size, 1)
        self.rollout: Rollout = rollout_of(objective)

    def by_depth(self, depths: Sequence[int]) -> list[DepthLosses]:
        """Nats/token at every depth, ascending: the loss, or the variational bound."""
        return self._over_batches(self.rollout.losses, depths)

    def by_solver(self, depths: Sequence[int], num_trajectories: int) -> list[DepthLosses]:
        """Nats/token under the mean readout of so many runs of the configured solver."""
        return self._over_batches(partial(self.rollout.sampled_losses, num_trajectories=num_trajectories), depths)

    def by_level(self, num_levels: int) -> list[tuple[float, Float64[Tensor, "num"]]]:
        """(noise level, nats/token) from the highest level on; none where the objective has no levels."""
        whole_number("num_levels", num_levels, 1)
        return [(level, self._over_batches(partial(self._at_level, level), [1])[0].losses)
                for level in self.rollout.levels(num_levels)]

    def limit(self, num_levels: int) -> Float64[Tensor, "num"]:
        """The bound of ever more steps, nats/token, each sequence read at so many levels."""
        return self._over_batches(partial(self._limit, num_levels), [num_levels])[0].losses

    def _at_level(self, level: float, rows: Tokens, depths: list[int], random: StepRandom) -> list[tuple]:
        return [(depths[0], self.rollout.losses_at(self.objective.ask(rows), level, random), 0.0)]

    def _limit(self, num_levels: int, rows: Tokens, depths: list[int], random: StepRandom) -> list[tuple]:
        return [(depths[0], self.rollout.limit(rows, num_levels, random).unsqueeze(1), 0.0)]

    @torch.no_grad()
    def _over_batches(self, measure: Callable, depths: Sequence[int]) -> list[DepthLosses]:
        tokens, depths = self.tokens, depths_of(depths)
        totals = {depth: ([], []) for depth in depths}
        counts = []
        with evaluating(self.objective):
            for start in range(0, len(tokens), self.batch_size):
                rows = tokens[start : start + self.batch_size]
                random = StepRandom(self.seed, 0, start=start, count=len(rows), total=len(tokens), device=rows.device)
                batch = self.objective.ask(rows)
                counts.append(batch.sought.sum(1).cpu())
                for depth, losses, seconds in measure(rows, depths, random):
                    totals[depth][0].append(batch.mean(losses).cpu().double())
                    totals[depth][1].append(seconds)
        sought = torch.cat(counts)
        share = sought.sum().item() / (len(tokens) * (tokens.shape[1] - 1))
        return [DepthLosses(depth, _a_token(torch.cat(losses), sought), sum(seconds), share)
                for depth, (losses, seconds) in totals.items()]


def losses_by_depth(objective: Objective, tokens: Tokens, depths: Sequence[int], *, seed: int = 0,
                    batch_size: int = 16) -> list[DepthLosses]:
    """Nats/token of every sequence at every depth, depths ascending; for denoisers and masked diffusion the variational
    bound."""
    return Likelihood(objective, tokens, seed=seed, batch_size=batch_size).by_depth(depths)


def masked_bounds(objective: Objective, tokens: Tokens, num_levels: int, *, seed: int = 0,
                  batch_size: int = 16) -> Float[Tensor, "num"]:
    """The bound of masked diffusion with ever more steps, nats/token of every sequence, each read at `num_levels`
    levels."""
    return Likelihood(objective, tokens, seed=seed, batch_size=batch_size).limit(num_levels)


def losses_by_solver(objective: Objective, tokens: Tokens, depths: Sequence[int], *, num_trajectories: int,
                     seed: int = 0, batch_size: int = 16) -> list[DepthLosses]:
    """Nats/token under the mean readout of `num_trajectories` runs of the configured solver.

    An upper bound that falls as trajectories are added, and slowly where a readout is nearly certain: with k of them a
    token of probability far below 1/k is hardly ever hit.
    """
    return Likelihood(objective, tokens, seed=seed, batch_size=batch_size).by_solver(depths, num_trajectories)


def losses_by_sigma(objective: Objective, tokens: Tokens, *, num_levels: int = 12, seed: int = 0,
                    batch_size: int = 16) -> list[tuple[float, Float[Tensor, "num"]]]:
    """(sigma, nats/token of every sequence) at levels evenly spaced in ln sigma, highest first, in one pass each."""
    return Likelihood(objective, tokens, seed=seed, batch_size=batch_size).by_level(num_levels)


def main_losses(objective: Objective, tokens: Tokens, depth: int, *, seed: int = 0, batch_size: int = 16,
                num_levels: int = 32) -> Float[Tensor, "num"]:
    """The one figure a sequence that all objectives have, nats/token as a next-token predictor: of a denoiser the
    cross-entropy at sigma_max, in one pass (of blocks: of each token without the others of its block); of a loop the
    loss at `depth`; of masked diffusion, which predicts no next token, the bound over `num_levels` levels."""
    likelihood = Likelihood(objective, tokens, seed=seed, batch_size=batch_size)
    return likelihood.rollout.main(likelihood, depth, num_levels)


@torch.no_grad()
def next_token_losses(objective: Objective, rows: Tokens, depth: int, *,
                      seed: int = 0) -> Float[Tensor, "num length"]:
    """Nats of every token of `rows` but the first at one depth; for denoisers the variational bound. Raises UserError
    for masked diffusion, whose bound is one of whole texts."""
    rows, rollout = _sequences(objective, rows), rollout_of(objective)
    if not rollout.next_token:
        raise UserError("objective masked gives a whole text its bound and no token its own loss, so it can neither "
                        "judge samples nor be a twin; choose a run of --objective ar")
    random = StepRandom(seed, 0, count=len(rows), device=rows.device)
    with evaluating(objective):
        (_, losses, _), = rollout.losses(rows, depths_of([depth]), random)
    return losses


def _sequences(objective: Objective, tokens: Tokens) -> Tokens:
    """Sequences to be read. Raises UserError for what is no objective over token ids, or for other ids than its own."""
    require_objective(objective)
    if not hasattr(objective.model, "vocab_size"):
        raise UserError(f"nats/token are of text, and this objective reads none; it is over a "
                        f"{type(objective.model).__name__}")
    return ids_of(tokens, objective.model.vocab_size, least_length=2)


def _a_token(means: Float64[Tensor, "num"], counts: Int[Tensor, "num"]) -> Float64[Tensor, "num"]:
    """Means of sequences, as they are where all have as many tokens; else weighed by the number of these."""
    return means if bool((counts == counts[0]).all()) else per_token(means * counts, counts)
