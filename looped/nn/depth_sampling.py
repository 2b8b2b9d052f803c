"""Random depth of a training step, as in Huginn: loop steps without gradient, then the last few with it.

The rate is log-normal with the mean recurrence as its mean, the depth p = Poisson(rate) + 1, and the last
k = min(p, backprop) steps carry gradient ("poisson-lognormal-filling" of seal-rg/recurrent-pretraining; Geiping et al.
2025, arXiv 2502.05171).
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from looped.errors import UserError
from looped.nn.checks import whole_number
from looped.rng import StepRandom
from looped.tensor_types import Int

SIGMA = 0.5
"""Standard deviation of the log-normal rate (Huginn)."""
DISTRIBUTIONS = ("huginn", "fixed")


def huginn_depths(mean: int, backprop: int, generators: Sequence[torch.Generator],
                  quantile: float = 1.0) -> tuple[Tensor, Tensor]:
    """(n, k) for each generator: steps without and with gradient. E[n + k] = mean + 1 for `quantile` 1; below it, a
    depth above that quantile of the distribution is drawn anew."""
    p, most = _poisson_lognormal(mean, generators), _deepest(mean, quantile)
    while bool((above := p > most).any()):
        again = _poisson_lognormal(mean, [gen for gen, deep in zip(generators, above.tolist(), strict=True) if deep])
        p = p.masked_scatter(above, again)
    k = p.clamp(max=backprop)
    return p - k, k


def _poisson_lognormal(mean: int, generators: Sequence[torch.Generator]) -> Tensor:
    tau = math.log(mean) - SIGMA**2 / 2
    rates = torch.stack([torch.randn((), generator=gen, dtype=torch.float64) for gen in generators])
    rates = torch.exp(tau + SIGMA * rates)
    draws = [torch.poisson(rate, generator=gen) for rate, gen in zip(rates, generators, strict=True)]
    return torch.stack(draws).long() + 1


@lru_cache
def _deepest(mean: int, quantile: float) -> float:
    """The largest depth that is not drawn anew."""
    return huginn_quantiles(mean, [quantile])[0] if quantile < 1 else math.inf


def sample_depths(mean: int, backprop: int, random: StepRandom, *, distribution: str = "huginn",
                  per_sequence: bool = True, quantile: float = 1.0
                  ) -> tuple[int | Int[Tensor, "batch"], int | Int[Tensor, "batch"]]:
    """(n, k): loop steps without gradient and with it, as `RecurrentDepth.unroll(e, no_grad=n, grad=k)` takes them.

    mean: mean recurrence, one less than the mean depth, as in Huginn's code; `fixed` runs exactly `mean` steps, of
    which the last `backprop` carry gradient.
    random: `StepRandom(seed, step, count=B)`, the draws of B sequences in one optimiser step. per_sequence: tensors
    (B,), one depth per sequence (Parcae); otherwise one pair of numbers, equal on every process. quantile: depths above
    it are drawn anew, since a batch runs as many steps as its deepest sequence. Raises `UserError` for numbers below 1
    and unknown distributions.
    """
    mean, backprop = whole_number("mean", mean, 1), whole_number("backprop", backprop, 1)
    if distribution not in DISTRIBUTIONS:
        raise UserError(f"depth distribution '{distribution}' is unknown; use {' or '.join(DISTRIBUTIONS)}")
    if distribution == "fixed":
        k = min(mean, backprop)
        return mean - k, k
    if per_sequence:
        return huginn_depths(mean, backprop, random.per_row("depth"), quantile)
    n, k = huginn_depths(mean, backprop, [random.lockstep("depth")], quantile)
    return int(n), int(k)


def expected_depths(mean: int, backprop: int, *, distribution: str = "huginn",
                    quantile: float = 1.0) -> tuple[float, float]:
    """(E[n], E[k]) of `sample_depths`, in closed form up to a quadrature over the rate."""
    if distribution == "fixed":
        k = min(mean, backprop)
        return float(mean - k), float(k)
    most = _deepest(mean, quantile)
    # E[min(p, s)] = sum over j = 1 ... s of P(p >= j), and p - 1 is Poisson given the rate: average over its quantiles.
    pmf = _probabilities(mean, backprop if most == math.inf else int(most))
    if most == math.inf:
        k = float((1 - torch.cat([torch.zeros(1, dtype=torch.float64), pmf.cumsum(0)])[:backprop]).sum())
        return mean + 1 - k, k
    depth, pmf = torch.arange(1, int(most) + 1), pmf / pmf.sum()
    k = float((depth.clamp(max=backprop) * pmf).sum())
    return float((depth * pmf).sum()) - k, k


def _probabilities(mean: int, most: int) -> Tensor:
    """P(p = j) for the depths j = 1 ... most."""
    rate = _rates(mean)
    counts = torch.arange(most, dtype=torch.float64).unsqueeze(1)
    return (counts * rate.log() - rate - torch.lgamma(counts + 1)).exp().mean(1)


def huginn_quantiles(mean: int, levels: Sequence[float]) -> list[int]:
    """The smallest depths p with P(depth <= p) >= level, by quadrature over the rate."""
    rate = _rates(mean)
    quantiles, depth, below = [], 0, 0.0
    for level in sorted(levels):
        while below < level:
            depth += 1  # depth - 1 is Poisson given the rate: P(depth <= p) = Q(p, rate), the upper gamma ratio
            below = torch.special.gammaincc(torch.tensor(float(depth), dtype=torch.float64), rate).mean().item()
        quantiles.append(depth)
    return quantiles


def _rates(mean: int) -> Tensor:
    """20,000 equally likely values of the log-normal rate."""
    quantiles = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    return torch.exp(math.log(mean) - SIGMA**2 / 2 + SIGMA * torch.special.ndtri(quantiles))
