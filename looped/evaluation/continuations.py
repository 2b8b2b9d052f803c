"""Log-probability of the last tokens of sequences of any lengths, at every depth.

Of a loop one unroll gives all depths (`looped.inference.rollout`). Sequences that are read together have one length,
and draws are those of the positions, so no figure depends on the batch. What has been scored is kept.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from looped.errors import UserError
from looped.inference.rollout import at_once, rollout_of
from looped.nn.checks import ids_of, whole_number
from looped.objectives.base import Objective, evaluating
from looped.rng import ByPlace

Asked = tuple[tuple[int, ...], int]
"""(tokens of a sequence, how many of its last ones are scored)."""


@dataclass(frozen=True)
class Scored:
    """`nats`: the sum over the tokens that are scored. `likeliest`: whether each is the likeliest where it stands."""

    nats: float
    likeliest: bool


class Continuations:
    """The scores of sequences under one objective. Raises UserError where single tokens have none."""

    def __init__(self, objective: Objective, depths: Sequence[int], *, seed: int = 0, batch_size: int = 16):
        rollout = rollout_of(objective)
        if not rollout.next_token:
            raise UserError("objective masked gives a whole text its bound and no token its own loss, so it cannot "
                            "score the answers of tasks; choose a run of --objective ar")
        if rollout.tokens_at_once > 1:
            raise UserError(f"denoise.block_size {rollout.tokens_at_once} denoises tokens together, so that one of "
                            f"them has no loss given those before it alone; choose a run with a block of 1 for tasks")
        self.objective = objective
        self.rollout = rollout
        self.seed = seed
        self.groups: list[tuple[int, ...]] = at_once(objective, depths)
        self.batch_size: int = whole_number("batch_size", batch_size, 1)
        self.found: dict[tuple[Asked, int], Scored] = {}

    def at(self, depth: int, asked: Iterable[Asked]) -> list[Scored]:
        """The scores at one of the depths."""
        asked = list(asked)
        group = next(group for group in self.groups if depth in group)
        new = sorted({each for each in asked if (each, depth) not in self.found}, key=lambda each: (len(each[0]), each))
        with evaluating(self.objective), torch.no_grad():
            for _, alike in itertools.groupby(new, key=lambda each: len(each[0])):
                rows = list(alike)
                for start in range(0, len(rows), self.batch_size):
                    self._score(rows[start : start + self.batch_size], list(group))
        return [self.found[each, depth] for each in asked]

    def _score(self, asked: Sequence[Asked], depths: list[int]) -> None:
        """Sequences of one length."""
        device = next(self.objective.parameters()).device
        rows = ids_of(torch.tensor([tokens for tokens, _ in asked]), self.objective.model.vocab_size, least_length=2)
        random = ByPlace(self.seed, len(rows), device)
        for depth, losses, likeliest in self.rollout.next_tokens(rows.to(device), depths, random):
            losses, likeliest = losses.cpu().double(), likeliest.cpu()
            for row, each in enumerate(asked):
                own = slice(losses.shape[1] - each[1], None)
                self.found[each, depth] = Scored(losses[row, own].sum().item(), bool(likeliest[row, own].all()))
