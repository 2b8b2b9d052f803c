"""Held-out likelihood: nats/token at every requested depth, and a denoiser's loss by noise level.

A loop is unrolled once to the deepest depth and read out on the way. For a denoiser at n steps the figure is the
variational bound (NELBO) of its n-step stochastic solver (`looped.inference.text_denoising`), for masked diffusion the
bound of n unmasking steps (`looped.inference.unmasking_rollout`). `losses_by_solver` measures the configured solver
itself: it samples many trajectories and averages their readouts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from looped.data.batch import Batch
from looped.errors import UserError
from looped.evaluation.workers import ALONE, Workers
from looped.inference.rollout import Rollout, rollout_of
from looped.inference.sequence_batch import per_token
from looped.nn.checks import depths_of, ids_of, kind_of, whole_number
from looped.objectives.base import Objective, evaluating, require_text
from looped.objectives.leaks import check_core, in_two_documents
from looped.rng import StepRandom
from looped.tensor_types import Float, Float64, Int

Tokens = Int[Tensor, "num length_and_one"]
Documents = Tokens | Sequence[Int[Tensor, "_"]]
"""Sequences of one length, or documents of any lengths."""


@dataclass(frozen=True)
class DepthLosses:
    """`losses`: nats/token of each held-out sequence at one depth; if sequences have unequal numbers of scored tokens,
    values whose mean is the mean over all scored tokens. `seconds`: for all sequences at this depth. `share`: fraction
    of the tokens that are scored."""

    depth: int
    losses: Float[Tensor, "num"]
    seconds: float
    share: float = 1.0


class Likelihood:
    """Losses of each of a set of sequences, computed in batches; random draws depend on a sequence's index alone. The
    objective keeps its train or eval mode.

    tokens: (N, L + 1), or documents of any lengths. lengths (N,): the number of real tokens of each row; the rest is
    padding on the right, which is neither scored nor seen. workers: the processes that divide the batches. Raises
    UserError for an objective that is not over token ids, for ids outside its vocabulary, for lengths under a rule
    whose tokens see later ones, and for a custom core that reads what the attention mask hides.
    """

    def __init__(self, objective: Objective, tokens: Documents, *, seed: int = 0, batch_size: int = 16,
                 lengths: Int[Tensor, "num"] | None = None, workers: Workers = ALONE):
        self.objective = objective
        self.workers = workers
        self.tokens: Tokens
        self.tokens, self.lengths = _sequences(objective, tokens, lengths)
        self.seed = seed
        self.batch_size: int = workers.batch_size(whole_number("batch_size", batch_size, 1), len(self.tokens))
        self.rollout: Rollout = rollout_of(objective)
        if self.lengths is not None and not (self.rollout.next_token and self.rollout.tokens_at_once == 1):
            raise UserError("documents of several lengths are padded on the right, and under this rule a token sees "
                            "later ones, so the padding would count; give sequences of one length")
        check_core(objective, self._run_few)

    def by_depth(self, depths: Sequence[int]) -> list[DepthLosses]:
        """Nats/token at every depth, ascending: the loss, or the variational bound."""
        return self._over_batches(self.rollout.losses, depths)

    @torch.no_grad()
    def by_token(self, depths: Sequence[int]) -> Float[Tensor, "depths num length"]:
        """Nats of every token but the first at every depth, ascending; NaN for tokens that are not scored. Raises
        UserError if the objective has no loss per token."""
        _require_next_token(self.rollout, "it has no token losses by depth")
        depths, parts = depths_of(depths), []
        with evaluating(self.objective):
            for rows, random in self._batches():
                losses = torch.stack([each.float() for _, each, _ in self.rollout.losses(rows, depths, random)])
                parts.append(losses.masked_fill(~self._asked(rows, random).sought, math.nan).cpu())
        return torch.cat(parts, dim=1)

    def by_solver(self, depths: Sequence[int], num_trajectories: int) -> list[DepthLosses]:
        """Nats/token under the mean readout of `num_trajectories` runs of the configured solver."""
        return self._over_batches(partial(self.rollout.sampled_losses, num_trajectories=num_trajectories), depths)

    def by_level(self, num_levels: int) -> list[tuple[float, Float64[Tensor, "num"]]]:
        """(noise level, nats/token), highest level first; empty if the objective has no noise levels."""
        whole_number("num_levels", num_levels, 1)
        return [(level, self._over_batches(partial(self._at_level, level), [1])[0].losses)
                for level in self.rollout.levels(num_levels)]

    def limit(self, num_levels: int) -> Float64[Tensor, "num"]:
        """The bound in the limit of infinitely many steps, nats/token, estimated at `num_levels` levels."""
        return self._over_batches(partial(self._limit, num_levels), [num_levels])[0].losses

    def _run_few(self) -> None:
        few = in_two_documents(self.objective, self.tokens[:2])
        list(self.rollout.losses(few, [1], StepRandom(self.seed, 0, count=len(few), device=few.device)))

    def _at_level(self, level: float, rows: Tokens, depths: list[int], random: StepRandom) -> list[tuple]:
        return [(depths[0], self.rollout.losses_at(self.objective.ask(rows), level, random), 0.0)]

    def _limit(self, num_levels: int, rows: Tokens, depths: list[int], random: StepRandom) -> list[tuple]:
        return [(depths[0], self.rollout.limit(rows, num_levels, random).unsqueeze(1), 0.0)]

    def _batches(self) -> Iterator[tuple[Tokens, StepRandom]]:
        """Batches of the sequences, each with the random draws of their indices."""
        for start in range(0, len(self.tokens), self.batch_size):
            rows = self.tokens[start : start + self.batch_size]
            yield rows, StepRandom(self.seed, 0, start=start, count=len(rows), total=len(self.tokens),
                                   device=rows.device)

    def _asked(self, rows: Tokens, random: StepRandom) -> Batch:
        """The batch that the rule makes of some sequences, padding not scored."""
        batch = self.objective.ask(rows)
        if self.lengths is None:
            return batch
        lengths = self.lengths[random.start : random.start + len(rows)].unsqueeze(1)
        real = torch.arange(1, rows.shape[1], device=rows.device) < lengths
        return replace(batch, scored=batch.sought & real)

    @torch.no_grad()
    def _over_batches(self, measure: Callable, depths: Sequence[int]) -> list[DepthLosses]:
        tokens, depths = self.tokens, depths_of(depths)

        def of_batch(placed: tuple[Tokens, StepRandom]) -> tuple[Tensor, dict[int, tuple[Tensor, float]]]:
            batch = self._asked(*placed)
            measured = measure(placed[0], depths, placed[1])
            return batch.sought.sum(1).cpu(), {depth: (batch.mean(losses).cpu().double(), seconds)
                                               for depth, losses, seconds in measured}

        with evaluating(self.objective):
            counts, found = zip(*self.workers.over(self._batches(), of_batch), strict=True)
        sought = torch.cat(counts)
        real = len(tokens) * (tokens.shape[1] - 1) if self.lengths is None else int((self.lengths - 1).sum())
        share = sought.sum().item() / real
        return [DepthLosses(depth, _weighted(torch.cat([each[depth][0] for each in found]), sought),
                            sum(each[depth][1] for each in found), share) for depth in depths]


def losses_by_depth(objective: Objective, tokens: Documents, depths: Sequence[int], *, seed: int = 0,
                    batch_size: int = 16, lengths: Int[Tensor, "num"] | None = None) -> list[DepthLosses]:
    """Nats/token of every sequence at every depth, depths ascending; for denoisers and masked diffusion the variational
    bound. Arguments as of `Likelihood`."""
    return Likelihood(objective, tokens, seed=seed, batch_size=batch_size, lengths=lengths).by_depth(depths)


def token_losses_by_depth(objective: Objective, tokens: Documents, depths: Sequence[int], *, seed: int = 0,
                          batch_size: int = 16,
                          lengths: Int[Tensor, "num"] | None = None) -> Float[Tensor, "depths num length"]:
    """Nats of every token but the first at every depth, depths ascending and unique; `losses_by_depth` gives their
    means. A loop is unrolled once, to the deepest. For denoisers it is the variational bound. NaN for tokens that are
    not scored, padding among them. Arguments as of `Likelihood`; raises UserError for masked diffusion, whose bound is
    on whole texts."""
    return Likelihood(objective, tokens, seed=seed, batch_size=batch_size, lengths=lengths).by_token(depths)


def masked_bounds(objective: Objective, tokens: Tokens, num_levels: int, *, seed: int = 0,
                  batch_size: int = 16) -> Float[Tensor, "num"]:
    """The bound of masked diffusion in the limit of infinitely many steps: nats/token of every sequence, estimated at
    `num_levels` levels."""
    return Likelihood(objective, tokens, seed=seed, batch_size=batch_size).limit(num_levels)


def losses_by_solver(objective: Objective, tokens: Tokens, depths: Sequence[int], *, num_trajectories: int,
                     seed: int = 0, batch_size: int = 16) -> list[DepthLosses]:
    """Nats/token under the mean readout of `num_trajectories` runs of the configured solver.

    An upper bound that falls as trajectories are added. It falls slowly if readouts are nearly certain: k trajectories
    hardly ever hit a token of probability far below 1/k.
    """
    return Likelihood(objective, tokens, seed=seed, batch_size=batch_size).by_solver(depths, num_trajectories)


def losses_by_sigma(objective: Objective, tokens: Tokens, *, num_levels: int = 12, seed: int = 0,
                    batch_size: int = 16) -> list[tuple[float, Float[Tensor, "num"]]]:
    """(sigma, nats/token of every sequence) at levels evenly spaced in ln sigma, highest first; one pass per level."""
    return Likelihood(objective, tokens, seed=seed, batch_size=batch_size).by_level(num_levels)


def main_losses(objective: Objective, tokens: Tokens, depth: int, *, seed: int = 0, batch_size: int = 16,
                num_levels: int = 32, workers: Workers = ALONE) -> Float[Tensor, "num"]:
    """Nats/token of every sequence as a next-token predictor, the one figure that all objectives have.

    For a denoiser it is the bound of one pass: the cross-entropy at sigma_max and what z says of the token there (with
    blocks: of each token without the others of its block); for a loop the loss at `depth`; for masked diffusion, which
    predicts no next token, the bound over `num_levels` levels.
    """
    likelihood = Likelihood(objective, tokens, seed=seed, batch_size=batch_size, workers=workers)
    return likelihood.rollout.main(likelihood, depth, num_levels)


@torch.no_grad()
def next_token_losses(objective: Objective, rows: Tokens, depth: int, *,
                      seed: int = 0) -> Float[Tensor, "num length"]:
    """Nats of every token of `rows` but the first at one depth; for denoisers the variational bound. Raises UserError
    for masked diffusion, whose bound is on whole texts."""
    (rows, _), rollout = _sequences(objective, rows), rollout_of(objective)
    _require_next_token(rollout, "it can neither judge samples nor be a baseline")
    random = StepRandom(seed, 0, count=len(rows), device=rows.device)
    with evaluating(objective):
        (_, losses, _), = rollout.losses(rows, depths_of([depth]), random)
    return losses


def _require_next_token(rollout: Rollout, so: str) -> None:
    """Raises UserError if the objective has no loss per token."""
    if not rollout.next_token:
        raise UserError(f"objective masked has a bound on whole texts and no loss per token, so {so}; choose a run of "
                        f"--objective ar")


def _sequences(objective: Objective, tokens: Documents, lengths: Int[Tensor, "num"] | None = None
               ) -> tuple[Tokens, Int[Tensor, "num"] | None]:
    """(sequences as one tensor, their lengths if they differ). Raises UserError; see `Likelihood`."""
    require_text(objective, "nats/token")
    if isinstance(tokens, list | tuple):
        if lengths is not None:
            raise UserError("lengths are for a tensor of padded rows; documents in a list have their own")
        if not tokens or not all(isinstance(each, Tensor) and each.ndim == 1 for each in tokens):
            odd = next((each for each in tokens if not (isinstance(each, Tensor) and each.ndim == 1)), None)
            raise UserError("documents are a list of tensors of one axis, the token ids of each; "
                            + ("give at least one" if odd is None else f"one of them is {kind_of(odd)}"))
        lengths = torch.tensor([len(each) for each in tokens], device=tokens[0].device)
        tokens = pad_sequence(list(tokens), batch_first=True)
    tokens = ids_of(tokens, objective.model.vocab_size, least_length=2)
    if lengths is None:
        return tokens, None
    lengths = torch.as_tensor(lengths, device=tokens.device)
    if lengths.shape != (len(tokens),) or not bool(((lengths >= 2) & (lengths <= tokens.shape[1])).all()):
        raise UserError(f"lengths must be {len(tokens)} numbers of tokens, one per row, from 2 (a document of one "
                        f"token has none to predict) to the {tokens.shape[1]} of the rows; got {lengths.tolist()[:8]}")
    return tokens, None if bool((lengths == tokens.shape[1]).all()) else lengths


def _weighted(means: Float64[Tensor, "num"], counts: Int[Tensor, "num"]) -> Float64[Tensor, "num"]:
    """Means of sequences, unchanged if all have equally many tokens, else weighted by their numbers of tokens."""
    return means if bool((counts == counts[0]).all()) else per_token(means * counts, counts)
