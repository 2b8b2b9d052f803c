"""Log-probability of the last tokens of sequences of any length, at every depth.

One unroll of a loop gives all depths (`looped.inference.rollout`). Only sequences of equal length share a batch, and
random draws depend on the position alone, so no score depends on the batch. Scores are cached.
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
    """`nats`: sum over the scored tokens. `likeliest`: True if every scored token is the argmax at its position."""

    nats: float
    likeliest: bool


class Continuations:
    """Scores of sequences under one objective. Raises UserError if the objective has no loss per token."""

    def __init__(self, objective: Objective, depths: Sequence[int], *, seed: int = 0, batch_size: int = 16):
        rollout = rollout_of(objective)
        if not rollout.next_token:
            raise UserError("objective masked has a bound on whole texts and no loss per token, so it cannot score the "
                            "answers of tasks; choose a run of --objective ar")
        if rollout.tokens_at_once > 1:
            raise UserError(f"denoise.block_size {rollout.tokens_at_once} predicts tokens together, so a token has no "
                            f"loss given only those before it; choose a run with denoise.block_size 1 for tasks")
        self.objective = objective
        self.rollout = rollout
        self.seed = seed
        self.groups: list[tuple[int, ...]] = at_once(objective, depths)
        self.batch_size: int = whole_number("batch_size", batch_size, 1)
        self.found: dict[tuple[Asked, int], Scored] = {}

    def at(self, depth: int, asked: Iterable[Asked]) -> list[Scored]:
        """Scores at one of the depths."""
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
        """Score sequences of equal length."""
        device = next(self.objective.parameters()).device
        rows = ids_of(torch.tensor([tokens for tokens, _ in asked]), self.objective.model.vocab_size, least_length=2)
        random = ByPlace(self.seed, len(rows), device)
        for depth, losses, likeliest in self.rollout.next_tokens(rows.to(device), depths, random):
            losses, likeliest = losses.cpu().double(), likeliest.cpu()
            for row, each in enumerate(asked):
                own = slice(losses.shape[1] - each[1], None)
                self.found[each, depth] = Scored(losses[row, own].sum().item(), bool(likeliest[row, own].all()))
