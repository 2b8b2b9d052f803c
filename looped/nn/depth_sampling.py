"""Random depth of a training step: loop steps without gradient, then the last few with it.

    huginn   rate ~ log-normal with the mean recurrence as its mean, p = Poisson(rate) + 1
             ("poisson-lognormal-filling" of seal-rg/recurrent-pretraining; Geiping et al. 2025, arXiv 2502.05171)
    fixed    p is always the mean recurrence
    listed   p is one of the listed depths, with the listed weights

The last k = min(p, backprop) steps carry gradient and the n = p - k before them do not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from looped.errors import UserError
from looped.nn.checks import whole_number
from looped.rng import StepRandom
from looped.tensor_types import Int

SIGMA = 0.5
"""Standard deviation of the log-normal rate (Huginn)."""


@runtime_checkable
class Depths(Protocol):
    """A distribution of the depth p of a training step."""

    def draw(self, random: StepRandom) -> int | Int[Tensor, "batch"]:
        """p: one for each sequence, or one for the batch, equal on every process."""
        ...

    def expected(self, backprop: int) -> tuple[float, float]:
        """(E[p - k], E[k]) with k = min(p, backprop)."""
        ...

    def bounds(self) -> tuple[int, int]:
        """(smallest, largest) depth that counts as trained."""
        ...


class Fixed:
    """Always `mean` steps."""

    def __init__(self, mean: int):
        self.mean = mean

    def draw(self, random: StepRandom) -> int:
        return self.mean

    def expected(self, backprop: int) -> tuple[float, float]:
        k = min(self.mean, backprop)
        return float(self.mean - k), float(k)

    def bounds(self) -> tuple[int, int]:
        return self.mean, self.mean


class Huginn:
    """Log-normal Poisson depths with E[p] = mean + 1 for `quantile` 1; below it, depths above that quantile are drawn
    anew. Trained depths are the middle 90 %."""

    def __init__(self, mean: int, quantile: float = 1.0, per_sequence: bool = True):
        self.mean = mean
        self.quantile = quantile
        self.per_sequence = per_sequence

    def draw(self, random: StepRandom) -> int | Int[Tensor, "batch"]:
        if self.per_sequence:
            return self.draws(random.per_row("depth"))
        return int(self.draws([random.lockstep("depth")]))

    def draws(self, generators: Sequence[torch.Generator]) -> Int[Tensor, "batch"]:
        """One depth for each generator."""
        p, most = self._uncapped(generators), self.deepest
        while bool((above := p > most).any()):
            again = self._uncapped([gen for gen, deep in zip(generators, above.tolist(), strict=True) if deep])
            p = p.masked_scatter(above, again)
        return p

    def _uncapped(self, generators: Sequence[torch.Generator]) -> Tensor:
        tau = math.log(self.mean) - SIGMA**2 / 2
        rates = torch.stack([torch.randn((), generator=gen, dtype=torch.float64) for gen in generators])
        rates = torch.exp(tau + SIGMA * rates)
        draws = [torch.poisson(rate, generator=gen) for rate, gen in zip(rates, generators, strict=True)]
        return torch.stack(draws).long() + 1

    @property
    def deepest(self) -> float:
        """The largest depth that is not drawn anew."""
        return _deepest(self.mean, self.quantile)

    def expected(self, backprop: int) -> tuple[float, float]:
        """In closed form up to a quadrature over the rate."""
        most = self.deepest
        # E[min(p, s)] = sum over j = 1 ... s of P(p >= j), and p - 1 is Poisson given the rate: average over quantiles.
        pmf = _probabilities(self.mean, backprop if most == math.inf else int(most))
        if most == math.inf:
            k = float((1 - torch.cat([torch.zeros(1, dtype=torch.float64), pmf.cumsum(0)])[:backprop]).sum())
            return self.mean + 1 - k, k
        return _split(torch.arange(1, int(most) + 1), pmf / pmf.sum(), backprop)

    def bounds(self) -> tuple[int, int]:
        low, high = huginn_quantiles(self.mean, (0.05 * self.quantile, 0.95 * self.quantile))
        return low, high


class Listed:
    """The given depths, each with its weight, stratified over the sequences of a batch: of B sequences, a depth of
    probability w is that of B w rounded up or down."""

    def __init__(self, weights: Mapping[int, float], per_sequence: bool = True):
        self.per_sequence = per_sequence
        if not weights:
            raise UserError("a listed distribution of depths needs the depths and their weights; give them as "
                            "{1: 3, 4: 1}")
        self.depths = torch.tensor(sorted(whole_number("depth", depth, 1) for depth in weights))
        chances = torch.tensor([float(weights[depth]) for depth in sorted(weights)], dtype=torch.float64)
        self.chances = chances / chances.sum()

    def draw(self, random: StepRandom) -> int | Int[Tensor, "batch"]:
        if self.per_sequence:
            return self._at(random.stratified("depth"))
        return int(self._at(torch.rand((), generator=random.lockstep("depth"), dtype=torch.float64)))

    def _at(self, uniform: Tensor) -> Tensor:
        place = torch.searchsorted(self.chances.cumsum(0), uniform, right=True)
        return self.depths[place.clamp(max=len(self.depths) - 1)]

    def expected(self, backprop: int) -> tuple[float, float]:
        return _split(self.depths, self.chances, backprop)

    def bounds(self) -> tuple[int, int]:
        return int(self.depths[0]), int(self.depths[-1])


def _split(depths: Tensor, chances: Tensor, backprop: int) -> tuple[float, float]:
    """(E[p - k], E[k])"""
    k = float((depths.clamp(max=backprop) * chances).sum())
    return float((depths * chances).sum()) - k, k


DISTRIBUTIONS = ("huginn", "fixed", "listed")


def depths_of(distribution: str, mean: int, *, quantile: float = 1.0, listed: Mapping[int, float] | None = None,
              per_sequence: bool = True) -> Depths:
    """The distribution of a name. Raises `UserError` for unknown names, numbers below 1 and an empty list."""
    mean = whole_number("mean", mean, 1)
    makers: dict[str, Callable[[], Depths]] = {
        "huginn": lambda: Huginn(mean, quantile, per_sequence), "fixed": lambda: Fixed(mean),
        "listed": lambda: Listed(listed or {}, per_sequence)}
    if distribution not in makers:
        raise UserError(f"depth distribution '{distribution}' is unknown; use {' or '.join(DISTRIBUTIONS)}")
    return makers[distribution]()


def huginn_depths(mean: int, backprop: int, generators: Sequence[torch.Generator],
                  quantile: float = 1.0) -> tuple[Tensor, Tensor]:
    """(n, k) for each generator: steps without and with gradient. E[n + k] = mean + 1 for `quantile` 1; below it, a
    depth above that quantile of the distribution is drawn anew."""
    p = Huginn(mean, quantile).draws(generators)
    k = p.clamp(max=backprop)
    return p - k, k


def sample_depths(mean: int, backprop: int, random: StepRandom, *, distribution: str = "huginn",
                  per_sequence: bool = True, quantile: float = 1.0, listed: Mapping[int, float] | None = None
                  ) -> tuple[int | Int[Tensor, "batch"], int | Int[Tensor, "batch"]]:
    """(n, k): loop steps without gradient and with it, as `RecurrentDepth.unroll(e, no_grad=n, grad=k)` takes them.

    mean: mean recurrence, one less than the mean depth, as in Huginn's code; `fixed` runs exactly `mean` steps, of
    which the last `backprop` carry gradient; `listed` draws from the depths of `listed`, {depth: weight}.
    random: `StepRandom(seed, step, count=B)`, the draws of B sequences in one optimiser step. per_sequence: tensors
    (B,), one depth per sequence (Parcae); otherwise one pair of numbers, equal on every process. quantile: depths above
    it are drawn anew, since a batch runs as many steps as its deepest sequence. Raises `UserError` for numbers below 1
    and unknown distributions.
    """
    depths = depths_of(distribution, mean, quantile=quantile, listed=listed, per_sequence=per_sequence)
    return split_depths(depths.draw(random), whole_number("backprop", backprop, 1))


def split_depths(p: int | Int[Tensor, "batch"],
                 backprop: int) -> tuple[int | Int[Tensor, "batch"], int | Int[Tensor, "batch"]]:
    """(n, k) of depths p: the last k = min(p, backprop) steps carry gradient."""
    k = p.clamp(max=backprop) if isinstance(p, Tensor) else min(p, backprop)
    return p - k, k


def expected_depths(mean: int, backprop: int, *, distribution: str = "huginn", quantile: float = 1.0,
                    listed: Mapping[int, float] | None = None) -> tuple[float, float]:
    """(E[n], E[k]) of `sample_depths`."""
    return depths_of(distribution, mean, quantile=quantile, listed=listed).expected(backprop)


@lru_cache
def _deepest(mean: int, quantile: float) -> float:
    return huginn_quantiles(mean, [quantile])[0] if quantile < 1 else math.inf


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
