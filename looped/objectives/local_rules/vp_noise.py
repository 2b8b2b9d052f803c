"""Variance-preserving noise on the embedding u of a class: time runs from noise at 0 to the class at 1 (NoProp).

    z_t ~ N(sqrt(alpha(t)) u, (1 - alpha(t)) I),   SNR = alpha / (1 - alpha) = exp(log_snr(t))

Li, Teh, Pascanu 2025 (arXiv 2503.24322), sections 2.1 and 2.2, whose alpha with a bar is alpha here. Computed in
float64. Elsewhere in this toolkit noise is added to an unscaled signal: z / sqrt(alpha) at sigma = 1 / sqrt(SNR).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from looped.devices import widest
from looped.tensor_types import Float, Float64

Time = Float64[Tensor, "*times"]
SCHEDULE_WIDTH = 64
"""Width of the network of a learned schedule."""


class Schedule(nn.Module):
    """`log_snr(t)` and its derivative `slope(t)`, for times in [0, 1], in float64 on the CPU."""

    def log_snr(self, t: Time) -> Time:
        raise NotImplementedError

    def slope(self, t: Time) -> Time:
        raise NotImplementedError

    def noised(self, u: Float[Tensor, "batch dim"], t: Float64[Tensor, "batch"],
               eps: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """z_t, from standard normal draws `eps`."""
        snr = self.log_snr(t).unsqueeze(-1)
        return snr.sigmoid().sqrt().to(u) * u + (-snr).sigmoid().sqrt().to(u) * eps.to(u)

    def snr_slope(self, t: Time) -> Time:
        """d SNR / dt, the weight of the loss in continuous time."""
        return self.log_snr(t).exp() * self.slope(t)

    def flow(self, z: Tensor, u: Tensor, t: Time) -> Tensor:
        """dz/dt of the probability flow, given an estimate u of the clean vector.

        This is log_snr' / 2 (sqrt(alpha) u - alpha z), which keeps every z_t distributed as above.
        """
        alpha, half = self.log_snr(t).sigmoid(), self.slope(t) / 2
        return (half * alpha.sqrt()).to(z) * u - (half * alpha).to(z) * z


class Cosine(Schedule):
    """alpha = sin^2 of an angle linear in t (Nichol & Dhariwal 2021), truncated to the given ends of log_snr."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.first: float
        self.last: float
        self.first, self.last = (math.atan(math.exp(end / 2)) for end in (low, high))

    def _angle(self, t: Time) -> Time:
        return self.first + (self.last - self.first) * t

    def log_snr(self, t: Time) -> Time:
        return 2 * self._angle(t).tan().log()

    def slope(self, t: Time) -> Time:
        return 4 * (self.last - self.first) / (2 * self._angle(t)).sin()


class Learned(Schedule):
    """An increasing function between two learned ends: a network with positive weights (Kingma et al. 2021, appendix H;
    the paper's appendix B). Initialised to a straight line."""

    def __init__(self, low: float, high: float, *, width: int = SCHEDULE_WIDTH):
        super().__init__()
        self.ends: nn.Parameter = nn.Parameter(torch.tensor([low, high]))
        self.line: nn.Parameter = nn.Parameter(torch.zeros(()))
        self.rise: nn.Parameter = nn.Parameter(torch.full((width,), -8.0))  # softplus(-8) is almost 0
        self.steepness: nn.Parameter = nn.Parameter(torch.full((width,), 4.0))
        self.middle: nn.Parameter = nn.Parameter(torch.linspace(0, 1, width))

    def log_snr(self, t: Time) -> Time:
        low, high = self.ends.cpu().double()
        first, last = self._rising(t.new_zeros(())), self._rising(t.new_ones(()))
        return low + (high - low) * (self._rising(t) - first) / (last - first)

    def slope(self, t: Time) -> Time:
        low, high = self.ends.cpu().double()
        first, last = self._rising(t.new_zeros(())), self._rising(t.new_ones(()))
        line, rise, steepness = self._weights()
        steps = self._steps(t)
        steep = line + (rise * steepness * steps * (1 - steps)).sum(-1)
        return (high - low) * steep / (last - first)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(softplus(weight.cpu().double()) for weight in (self.line, self.rise, self.steepness))

    def _steps(self, t: Time) -> Tensor:
        return (softplus(self.steepness.cpu().double()) * (t.unsqueeze(-1) - self.middle.cpu().double())).sigmoid()

    def _rising(self, t: Time) -> Time:
        line, rise, _ = self._weights()
        return line * t + (rise * self._steps(t)).sum(-1)


SCHEDULES: dict[str, type[Schedule]] = {"cosine": Cosine, "learned": Learned}
"""Name -> schedule of (low, high), the ends of log_snr."""


def posterior(log_snr: Time, later: Time) -> tuple[Time, Time, Time]:
    """(a, b, c) of q(z_t | z_s, u) = N(a u + b z_s, c I), for the log_snr at a time s and at a `later` t (the paper's
    equation 3)."""
    alpha, noise = later.sigmoid(), (-later).sigmoid()
    earlier_alpha, earlier_noise = log_snr.sigmoid(), (-log_snr).sigmoid()
    kept = earlier_alpha / alpha
    a = alpha.sqrt() * (1 - kept) / earlier_noise
    return a, kept.sqrt() * noise / earlier_noise, noise * (1 - kept) / earlier_noise


def prior_divergence(u: Float[Tensor, "batch dim"], log_snr: Float64[Tensor, ""]) -> Float[Tensor, "batch"]:
    """KL(q(z_0 | u) || N(0, I)) in nats."""
    alpha, noise = log_snr.sigmoid(), (-log_snr).sigmoid()
    spread = u.shape[-1] * (noise - 1 - noise.log())
    wide = u.to(widest(u.device))
    return ((alpha.to(wide) * wide.square().sum(-1) + spread.to(wide)) / 2).to(u)
