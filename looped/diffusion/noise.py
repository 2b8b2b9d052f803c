"""Noise levels of training: distributions of sigma on [sigma_min, sigma_max], and their partition among blocks.

A distribution maps given uniform numbers (`StepRandom.stratified`) through its quantile function, so it holds no random
state. Everything is computed on x = ln sigma in float64.
"""

import math

import torch
from torch import Tensor, nn

from looped.devices import HostCopy, to_device, widest
from looped.errors import UserError
from looped.tensor_types import Bool, Float, Float64, Int64


class Noise(nn.Module):
    """A distribution of noise levels on [sigma_min, sigma_max]; subclasses define it in x = ln sigma.

    A module only so that the state of `Adaptive` is saved with the model; the other distributions have none.
    """

    learns: bool = False
    """True if losses change the distribution."""

    def __init__(self, sigma_min: float, sigma_max: float):
        super().__init__()
        if not 0 < sigma_min < sigma_max < math.inf:
            raise UserError(f"sigma_min {sigma_min} and sigma_max {sigma_max} are not a range; "
                            f"need 0 < sigma_min < sigma_max")
        self.sigma_min: float = float(sigma_min)
        self.sigma_max: float = float(sigma_max)
        self.x_min: float = math.log(sigma_min)
        self.x_max: float = math.log(sigma_max)

    @property
    def continuous(self) -> "Noise":
        """The part that has a density; schedules and partitions use this part only."""
        return self

    def sample(self, uniform: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        """Noise levels for uniform numbers in (0, 1)."""
        return self.quantile(uniform)

    def quantile(self, q: Float64[Tensor, "*shape"] | float) -> Float64[Tensor, "*shape"]:
        """The inverse of `cdf`; exactly sigma_min at 0 and sigma_max at 1."""
        q = torch.as_tensor(q, dtype=torch.float64)
        sigma = self._quantile(q).exp().clamp(self.sigma_min, self.sigma_max)
        sigma = torch.where(q <= 0, self.sigma_min, sigma)  # exp(log(sigma)) may be one unit off
        return torch.where(q >= 1, self.sigma_max, sigma)

    def cdf(self, sigma: Float[Tensor, "*shape"] | float) -> Float64[Tensor, "*shape"]:
        """Probability of a level at or below `sigma`."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        q = self._cdf(sigma.clamp(self.sigma_min, self.sigma_max).log()).clamp(0, 1)
        return torch.where(sigma >= self.sigma_max, 1.0, torch.where(sigma <= self.sigma_min, 0.0, q))

    def log_density(self, sigma: Float[Tensor, "*shape"] | float) -> Float64[Tensor, "*shape"]:
        """Natural logarithm of the density per unit of ln sigma (subtract ln sigma for the density of sigma)."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        inside = (sigma >= self.sigma_min) & (sigma <= self.sigma_max)
        x = sigma.clamp(self.sigma_min, self.sigma_max).log()
        return torch.where(inside, self._log_density(x), -math.inf)

    def observe(self, sigma: Float[Tensor, "*shape"], cross_entropy: Float[Tensor, "*shape"],
                counted: Bool[Tensor, "*shape"] | None = None) -> None:
        """Record losses at these levels, those that `counted` selects (None: all); only `Adaptive` learns from them."""

    def update(self) -> None:
        """Learn from the losses observed since the last call; every process calls it once per optimiser step."""

    def _quantile(self, q: Tensor) -> Tensor:
        raise NotImplementedError

    def _cdf(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _log_density(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class LogUniform(Noise):
    """ln sigma is uniform."""

    def _quantile(self, q):
        return self.x_min + q * (self.x_max - self.x_min)

    def _cdf(self, x):
        return (x - self.x_min) / (self.x_max - self.x_min)

    def _log_density(self, x):
        return torch.full_like(x, -math.log(self.x_max - self.x_min))


class LogNormal(Noise):
    """ln sigma ~ N(log_mean, log_std^2), truncated to the range (Karras et al. 2022, table 1: P_mean and P_std)."""

    def __init__(self, log_mean: float, log_std: float, sigma_min: float, sigma_max: float):
        super().__init__(sigma_min, sigma_max)
        self.log_mean: float = float(log_mean)
        self.log_std: float = float(log_std)
        low, high = ((x - log_mean) / log_std for x in (self.x_min, self.x_max))
        # The lower tail of a normal is the precise one in floating point.
        self.sign: float = -1.0 if low + high > 0 else 1.0
        self.at_min: float
        self.at_max: float
        self.at_min, self.at_max = (_normal_cdf(self.sign * end).item() for end in (low, high))
        if not abs(self.at_max - self.at_min) > 1e-290:
            raise UserError(f"log_mean {log_mean} with log_std {log_std} puts no mass on [{sigma_min}, {sigma_max}]; "
                            f"set log_mean between {self.x_min:.2f} and {self.x_max:.2f}")

    def _quantile(self, q):
        mass = (1 - q) * self.at_min + q * self.at_max  # a weighted sum: a difference would cancel in the tail
        return self.log_mean + self.log_std * self.sign * torch.special.ndtri(mass)

    def _cdf(self, x):
        mass = _normal_cdf(self.sign * (x - self.log_mean) / self.log_std)
        return (mass - self.at_min) / (self.at_max - self.at_min)

    def _log_density(self, x):
        constant = math.log(self.log_std * math.sqrt(2 * math.pi) * abs(self.at_max - self.at_min))
        return -0.5 * ((x - self.log_mean) / self.log_std) ** 2 - constant


class Adaptive(Noise):
    """Learned during training so that equal mass has equal change of cross-entropy: dense where the loss is steepest.

    This is the time warping of CDCD (Dieleman et al. 2022, arXiv 2211.15089, section 4.2). An exponential average of
    the cross-entropy is kept at nodes evenly spaced in ln sigma and made monotone by isotonic regression; its
    increments are the masses between nodes, mixed with a log-uniform fraction `floor`. Log-uniform until each node
    has been seen `min_count` times. The state is three buffers, so it is saved and resumed exactly. They stay on the
    host, where levels are drawn; the sums of a step's losses arrive there while its backward pass runs.
    """

    learns = True

    def __init__(self, sigma_min: float, sigma_max: float, *, num_bins: int = 32, decay: float = 0.99,
                 floor: float = 0.1, min_count: float = 8.0):
        super().__init__(sigma_min, sigma_max)
        if num_bins < 1 or not 0 <= decay < 1 or not 0 < floor <= 1:
            raise UserError(f"num_bins {num_bins}, decay {decay}, floor {floor}: need num_bins >= 1, decay in [0, 1) "
                            f"and floor in (0, 1], or some bins would never be sampled")
        self.num_bins = num_bins
        self.decay = decay
        self.floor = floor
        self.min_count = min_count
        for name in ("weight_average", "cross_entropy_average", "num_seen"):
            self.register_buffer(name, torch.zeros(num_bins + 1, dtype=torch.float64))
        # Not a buffer: DDP overwrites buffers with those of the first process, which would lose the others' losses.
        self._pending: list[HostCopy] = []
        self._device: torch.device = torch.device("cpu")
        """The device of the losses, on which processes exchange them."""

    def _apply(self, fn, recurse=True):
        """Stay on the host when the model moves."""
        return self

    @torch.no_grad()
    def observe(self, sigma: Float[Tensor, "*shape"], cross_entropy: Float[Tensor, "*shape"],
                counted: Bool[Tensor, "*shape"] | None = None) -> None:
        """Collect losses (nats) at these levels; nothing changes before `update`."""
        if sigma.shape != cross_entropy.shape:
            raise UserError(f"sigma {tuple(sigma.shape)} and cross_entropy {tuple(cross_entropy.shape)} differ; "
                            f"pass one loss per noise level")
        self._device = device = cross_entropy.device
        place = self._place(sigma.detach().double().clamp(self.sigma_min, self.sigma_max).log()).reshape(-1)
        loss, wide = cross_entropy.detach().reshape(-1), widest(device)
        place, loss = to_device(place.to(wide), device), loss.to(wide)
        nodes = torch.arange(self.num_bins + 1, device=device)
        seen = loss.isfinite() if counted is None else loss.isfinite() & counted.reshape(-1)
        # Each loss is split linearly between the two nodes around it. A product, since a scatter-add is not
        # reproducible on CUDA.
        share = (1 - (place[:, None] - nodes).abs()).clamp(min=0) * seen[:, None]  # (N, nodes)
        self._pending.append(HostCopy(torch.stack([torch.ones_like(loss), loss.nan_to_num(0.0, 0.0, 0.0)]) @ share))

    @torch.no_grad()
    def update(self) -> None:
        """Fold the observations of all processes into the averages; every process calls it once per optimiser step."""
        sums = torch.zeros(2, self.num_bins + 1, dtype=torch.float64)
        for copy in self._pending:
            sums += copy.wait()
        self._pending = []
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            there = sums.to(self._device, widest(self._device))
            torch.distributed.all_reduce(there)
            sums = there.double().cpu()
        self.weight_average.mul_(self.decay).add_(sums[0])
        self.cross_entropy_average.mul_(self.decay).add_(sums[1])
        self.num_seen.add_(sums[0])

    def cross_entropy(self) -> Float64[Tensor, "nodes"]:
        """The monotone estimate at `num_bins + 1` levels evenly spaced in ln sigma, on the CPU."""
        weight = self.weight_average.cpu().double().clamp(min=1e-300)
        return isotonic(self.cross_entropy_average.cpu().double() / weight, weight)

    def node_cdf(self) -> Float64[Tensor, "nodes"]:
        """The cumulative distribution at the nodes, on the CPU; linear in ln sigma between them."""
        uniform = torch.linspace(0, 1, self.num_bins + 1, dtype=torch.float64)
        if self.num_seen.min() < self.min_count:
            return uniform
        loss = self.cross_entropy()
        rise = loss[-1] - loss[0]
        if rise <= 0:
            return uniform
        return (1 - self.floor) * (loss - loss[0]) / rise + self.floor * uniform

    def _place(self, x: Tensor) -> Tensor:
        """x as a fractional node index, 0 ... num_bins."""
        return (x - self.x_min) / (self.x_max - self.x_min) * self.num_bins

    def _bin(self, x: Tensor) -> Tensor:
        return self._place(x).floor().clamp(0, self.num_bins - 1).long()

    def _quantile(self, q):
        cdf = self.node_cdf().to(q.device)
        node = (torch.searchsorted(cdf, q.contiguous(), right=True) - 1).clamp(0, self.num_bins - 1)
        place = node + (q - cdf[node]) / (cdf[node + 1] - cdf[node])
        return self.x_min + place / self.num_bins * (self.x_max - self.x_min)

    def _cdf(self, x):
        cdf, node = self.node_cdf().to(x.device), self._bin(x)
        return cdf[node] + (self._place(x) - node) * (cdf[node + 1] - cdf[node])

    def _log_density(self, x):
        mass = self.node_cdf().diff().to(x.device)
        return (mass[self._bin(x)] * self.num_bins / (self.x_max - self.x_min)).log()


class ShareAtMax(Noise):
    """A distribution plus an atom: a fraction `share` of the samples is exactly sigma_max, where solvers start."""

    def __init__(self, noise: Noise, share: float):
        super().__init__(noise.sigma_min, noise.sigma_max)
        if not 0 <= share <= 1:
            raise UserError(f"share_at_max {share} is not in [0, 1]")
        self.noise = noise
        self.share: float = float(share)

    @property
    def learns(self) -> bool:
        return self.noise.learns

    @property
    def continuous(self) -> Noise:
        return self.noise.continuous

    def sample(self, uniform: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        """Uniform numbers below `share` become sigma_max exactly; the others are stretched over the distribution."""
        rest = ((uniform - self.share) / max(1 - self.share, 1e-300)).clamp(0, 1)
        return torch.where(uniform < self.share, self.sigma_max, self.noise.sample(rest))

    def quantile(self, q: Float[Tensor, "*shape"] | float) -> Float64[Tensor, "*shape"]:
        q = torch.as_tensor(q, dtype=torch.float64)
        inner = self.noise.quantile((q / max(1 - self.share, 1e-300)).clamp(0, 1))
        return torch.where(q > 1 - self.share, self.sigma_max, inner)

    def cdf(self, sigma: Float[Tensor, "*shape"] | float) -> Float64[Tensor, "*shape"]:
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        return torch.where(sigma >= self.sigma_max, 1.0, (1 - self.share) * self.noise.cdf(sigma))

    def log_density(self, sigma: Float[Tensor, "*shape"] | float) -> Float64[Tensor, "*shape"]:
        """Log density of the continuous part, which integrates to 1 - share; the atom at sigma_max has no density."""
        return self.noise.log_density(sigma) + (math.log1p(-self.share) if self.share < 1 else -math.inf)

    def observe(self, sigma: Float[Tensor, "*shape"], cross_entropy: Float[Tensor, "*shape"],
                counted: Bool[Tensor, "*shape"] | None = None) -> None:
        self.noise.observe(sigma, cross_entropy, counted)

    def update(self) -> None:
        self.noise.update()


def partition(noise: Noise, num_blocks: int) -> Float64[Tensor, "{num_blocks}+1"]:
    """Descending edges with equal mass between neighbours; block b owns `edges[b + 1] < sigma <= edges[b]`.

    Block 0 owns the highest noise, and the last block sigma_min as well. For a log-normal these are the edges of
    DiffusionBlocks (arXiv 2506.14202, section 3). An atom at sigma_max is ignored: it would make edges coincide.
    """
    if num_blocks < 1:
        raise UserError(f"num_blocks {num_blocks} is below 1; a partition needs at least one block")
    return noise.continuous.quantile(torch.linspace(1, 0, num_blocks + 1, dtype=torch.float64))


def block_of(sigma: Float[Tensor, "*shape"] | float, edges: Float64[Tensor, "edges"]) -> Int64[Tensor, "*shape"]:
    """The block that owns each noise level; levels outside the range go to the nearest block.

    The edges are rounded to the precision of `sigma` first, so an edge that went through float32 keeps its block.
    """
    sigma = torch.as_tensor(sigma, dtype=None if isinstance(sigma, Tensor) else torch.float64)
    return (sigma[..., None] <= edges[1:-1].to(sigma)).sum(-1)


def interval(block: int, edges: Float64[Tensor, "edges"], overlap: float = 0.0) -> tuple[float, float]:
    """(lowest, highest) level a block trains on: its interval, widened at both ends by (high / low)^overlap.

    `[sigma_b / a, a sigma_(b-1)]`, `a = (sigma_(b-1) / sigma_b)^overlap` in the paper, which counts blocks from 1; here
    blocks count from 0, so `sigma_(b-1) = edges[block]` and `sigma_b = edges[block + 1]`. Clipped to the whole range.
    """
    num_blocks = len(edges) - 1
    if not 0 <= block < num_blocks:
        raise UserError(f"block {block} is not one of the {num_blocks} blocks; use 0 ... {num_blocks - 1}")
    if overlap < 0:
        raise UserError(f"overlap {overlap} is negative; 0 means no overlap")
    high, low = edges[block].item(), edges[block + 1].item()
    a = (high / low) ** overlap
    return max(low / a, edges[-1].item()), min(high * a, edges[0].item())


def intervals(edges: Float64[Tensor, "edges"], overlap: float = 0.0) -> list[tuple[float, float]]:
    """`interval` of every block."""
    return [interval(block, edges, overlap) for block in range(len(edges) - 1)]


def sample_between(noise: Noise, low: float, high: float,
                   uniform: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """Levels of a distribution restricted to [low, high], for uniform numbers in (0, 1)."""
    below, up_to = noise.cdf(low), noise.cdf(high)
    return noise.quantile(below + uniform * (up_to - below).to(uniform.device)).clamp(low, high)


def isotonic(values: Float64[Tensor, "nodes"], weights: Float64[Tensor, "nodes"]) -> Float64[Tensor, "nodes"]:
    """The non-decreasing sequence nearest to `values` in weighted least squares (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []  # (mean, weight, number of values)
    for mean, weight in zip(values.tolist(), weights.tolist(), strict=True):
        count = 1
        while pools and pools[-1][0] >= mean:
            other, other_weight, other_count = pools.pop()
            total = weight + other_weight
            mean, weight, count = (mean * weight + other * other_weight) / total, total, count + other_count
        pools.append((mean, weight, count))
    return torch.tensor([mean for mean, _, count in pools for _ in range(count)], dtype=values.dtype)


def _normal_cdf(x: Tensor | float) -> Tensor:
    """Standard normal CDF; `torch.special.ndtr` computes 1 + erf and loses its digits in the tail (zero at x = -10)."""
    return 0.5 * torch.special.erfc(-torch.as_tensor(x, dtype=torch.float64) * math.sqrt(0.5))
