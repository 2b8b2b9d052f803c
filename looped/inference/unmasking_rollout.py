"""Rollout of masked diffusion: NELBO in nats/token by the number of unmasking steps, and generation.

From level m to m' < m each masked token is revealed with probability (m - m') / m and drawn from the network, which
sees the text at level m. Along m_0 = 1 > ... > m_n = 0 this gives (MD4, Shi et al. 2024, arXiv 2406.04329, section 3)

    -ln p(x) <= sum over i of (m_i - m_i+1) / m_i * E at m_i[sum over the hidden of -ln p(token | seen)]

and, in the limit of infinitely many steps, the integral that training samples. Both are estimated as in
`Masked.losses_at`: without the variance of the weights, and exactly if all tokens have the same loss.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from looped.devices import now
from looped.diffusion import masking
from looped.diffusion.masking import unmask
from looped.inference.autoregressive import Writing
from looped.inference.cost import Cost
from looped.inference.rollout import Likelihood, Rollout
from looped.objectives.base import EVERYBODY
from looped.objectives.masked import Masked
from looped.rng import StepRandom
from looped.tensor_types import Float64, Int

Tokens = Int[Tensor, "batch length_and_one"]


class UnmaskRollout(Rollout):
    """Depth is the number of steps in which all masked tokens are revealed."""

    name = "unmask"
    next_token = False
    has_limit = True
    hidden_first = 1

    def losses(self, rows: Tokens, depths: list[int], random: StepRandom) -> Iterator[tuple[int, Tensor, float]]:
        for depth in depths:
            began = now(rows.device)
            losses = step_bound(self.objective, rows, depth, random)
            yield depth, losses.unsqueeze(1), now(rows.device) - began

    def likelihood_cost(self, depth: int) -> Cost:
        c, layers = self.model, self.model.core_layers
        owners = self.objective.owners(step_levels(self.objective, depth)[:-1]).tolist()
        return Cost(0, tuple(c.num_prelude_layers + layers[block] + c.num_coda_layers for block in owners))

    def main(self, likelihood: Likelihood, depth: int, num_levels: int) -> Tensor:
        """The bound over `num_levels` levels, because masked diffusion predicts no next token."""
        return likelihood.limit(num_levels)

    def limit(self, rows: Tokens, num_levels: int, random: StepRandom) -> Float64[Tensor, "batch"]:
        return bound(self.objective, rows, num_levels, random)

    def write(self, prompt: Int[Tensor, "batch length"], num_tokens: int, depth: int, way: Writing) -> Tensor:
        """Continuations, all tokens together. In training about a fraction m of a text is masked at level m, so a text
        with a visible prompt is at the level of its masked fraction, which also selects the block."""
        random, padding = way.draws(0), way.padding
        first, width = prompt.shape[1], prompt.shape[1] + num_tokens
        tokens = torch.nn.functional.pad(prompt, (0, num_tokens), value=self.objective.model.mask_token)
        sought = (torch.arange(width) >= first).expand(tokens.shape)
        whole = torch.full((len(prompt),), width, dtype=torch.float64)
        own = whole if padding.empty is None else whole - padding.num_empty  # columns that are not empty
        share = num_tokens / own
        rows = padding.rows(0, mask=padding.mask(width, causal=False) or EVERYBODY)

        def uniform(stream: str, step: int) -> Tensor:
            drawn = random.uniform(f"{stream}{step}", (num_tokens,))
            return torch.nn.functional.pad(drawn, (first, 0))  # a row's draws do not depend on its prompt

        return unmask(lambda tokens, m: way.steering(self.objective.logits(tokens, m * share, rows)), tokens, sought,
                      step_levels(self.objective, depth), uniform=uniform)[:, first:]


def step_levels(objective: Masked, num_steps: int) -> Float64[Tensor, "{num_steps}+1"]:
    """Levels that fall from 1 to 0, at evenly spaced times."""
    levels = masking.level(objective.config.schedule, torch.linspace(1, 0, num_steps + 1, dtype=torch.float64))
    levels[0], levels[-1] = 1, 0  # a cosine may miss the ends by rounding
    return levels


def step_bound(objective: Masked, rows: Tokens, num_steps: int, random: StepRandom) -> Float64[Tensor, "batch"]:
    """The bound of `num_steps` unmasking steps, from one draw of the mask at each."""
    batch = objective.ask(rows)
    total = torch.zeros(len(rows), dtype=torch.float64)
    for step, (m, lower) in enumerate(itertools.pairwise(step_levels(objective, num_steps).tolist())):
        level = torch.full_like(total, m)
        total += (m - lower) * objective.losses_at(batch, level, random, f"hidden{step}").cpu().double()
    return total


def bound(objective: Masked, rows: Tokens, num_levels: int, random: StepRandom) -> Float64[Tensor, "batch"]:
    """The bound in the limit of infinitely many steps: the mean over one level in each of `num_levels` equal parts of
    [0, 1]."""
    batch = objective.ask(rows)
    total = torch.zeros(len(rows), dtype=torch.float64)
    places = random.uniform("level", (num_levels,))
    for part, place in enumerate(places.unbind(1)):
        total += objective.losses_at(batch, (part + place) / num_levels, random, f"hidden{part}").cpu().double()
    return total / num_levels
