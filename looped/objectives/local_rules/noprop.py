"""NoProp: each block learns to predict the class from its noisy embedding; no training pass runs through all blocks.

    DT   -ln p(y | z_T) + KL(q(z_0 | u) || N(0, I)) + eta T / 2 (SNR(t) - SNR(t-1)) |u_t(z_{t-1}, x) - u|^2
    CT   -ln p(y | z_1) + KL(q(z_0 | u) || N(0, I)) + eta / 2 SNR'(t) |u(z_t, x, t) - u|^2
    FM   -ln p(y | z_t + (1 - t) v) + eta |v(z_t, x, t) - (u - z_0)|^2,   z_t = t u + (1 - t) z_0

u is the embedding of the class y of an image x, p(y | z) a linear map of z and a softmax, and the network's u_t the
mean of the class embeddings under its own softmax. Li, Teh, Pascanu 2025 (arXiv 2503.24322), equations 8 and 9 and
section 2.2. The image enters each block as in a denoiser; z enters in the row of the class.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from looped.config import Config
from looped.config.local_rules import NoPropConfig
from looped.data.batch import Batch
from looped.diffusion.clean_estimate import bridge
from looped.diffusion.denoiser import start_projection
from looped.models.language import LanguageModel
from looped.nn.projection import cast_for, head_logits
from looped.nn.rows import Rows
from looped.objectives.base import Classifier, Loss, Objective, rows_of_batch
from looped.objectives.local_rules.vp_noise import SCHEDULES, Schedule, posterior, prior_divergence
from looped.rng import StepRandom
from looped.tensor_types import Float, Int

Embedded = Float[Tensor, "batch dim"]


class NoProp(Classifier):
    """Base of the three variants: the class embedding, the projection of z into the network, and p(y | z)."""

    name: str

    @classmethod
    def from_config(cls, config: Config, model: nn.Module) -> Objective:
        return cls(model, config.noprop)

    def __init__(self, model: LanguageModel, config: NoPropConfig):
        super().__init__()
        self.model = model
        self.config = config
        self.eta: float = config.weight(self.name)
        learned = config.embedding == "learned"
        self.dim: int = config.dim if learned else model.vocab_size
        table = nn.init.orthogonal_(torch.empty(model.vocab_size, self.dim)) if learned else torch.eye(self.dim)
        self.table: nn.Parameter = nn.Parameter(table, requires_grad=learned)
        self.in_proj: nn.Linear = start_projection(self.dim, model.width)
        self.classifier: nn.Linear = nn.Linear(self.dim, model.vocab_size)

    def forward(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Loss:
        batch = Batch.of(tokens)
        rows, labels = rows_of_batch(batch), batch.targets[:, 0]
        e, u = self.model.encode(batch.inputs, rows), self.table[labels]
        named, terms = self.terms(u, e, rows, random)
        terms = {"cross_entropy": cross_entropy(named.float(), labels)} | terms
        value = torch.stack(list(terms.values())).sum()
        return Loss(value, {"loss": value.detach()} | {name: term.detach() for name, term in terms.items()})

    def terms(self, u: Embedded, e: Tensor, rows: Rows, random: StepRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """(logits of the final classifier, the loss terms other than its cross-entropy, by name)."""
        raise NotImplementedError

    def step(self, z: Embedded, e: Tensor, rows: Rows, depth: int, index: int, draw: Tensor) -> Embedded:
        """z after step `index` of `depth`; `draw` is standard normal."""
        raise NotImplementedError

    def num_steps(self, depth: int) -> int:
        """The number of steps taken at a requested `depth`."""
        return depth

    def class_logits(self, batch: Batch, depth: int, random: StepRandom, *,
                     stream: str = "") -> Float[Tensor, "batch classes"]:
        rows = rows_of_batch(batch)
        e = self.model.encode(batch.inputs, rows)
        z = random.normal(f"{stream}start", (self.dim,)).to(self.table)
        for index in range(self.num_steps(depth)):
            z = self.step(z, e, rows, depth, index, random.normal(f"{stream}step{index}", (self.dim,)))
        return self.classifier(z).float()

    def class_cost(self, depth: int) -> tuple[int, tuple[float, ...], int]:
        c = self.model
        blocks = itertools.islice(itertools.cycle(self.model.core_layers), self.num_steps(depth))
        return c.num_prelude_layers, tuple(float(layers + c.num_coda_layers) for layers in blocks), 1

    def hidden(self, z: Embedded, e: Tensor, rows: Rows,
               level: Tensor | None = None) -> Float[Tensor, "batch width"]:
        """The hidden state in the class row, given z in that row, at time `level` or through the block of `rows`."""
        state = torch.cat([self.in_proj(cast_for(self.in_proj, z)).unsqueeze(1), torch.zeros_like(e[:, 1:])], dim=1)
        return self.model.hidden(self.model.step(state, e, level, rows), rows)[:, 0]

    def estimate(self, z: Embedded, e: Tensor, rows: Rows, level: Tensor | None = None) -> Embedded:
        """The network's estimate of the clean embedding: the mean under its softmax."""
        return bridge("soft", head_logits(self.model, self.hidden(z, e, rows, level)), self.table)

    def layer_forwards(self) -> float:
        c = self.model
        return 3 * (c.num_prelude_layers + self.model.step_layers + c.num_coda_layers)


class Diffused(NoProp):
    """Base of the two variants (DT, CT) that denoise along a schedule of signal-to-noise ratios."""

    def __init__(self, model: LanguageModel, config: NoPropConfig):
        super().__init__(model, config)
        self.schedule: Schedule = SCHEDULES[config.schedule_of(self.name)](*config.log_snr)

    def bound(self, u: Embedded, error: Float[Tensor, "batch"], weight: Float[Tensor, "batch"] | float,
              random: StepRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """`terms` from the squared errors of a batch and their weights, without the factors 1 / 2 and eta."""
        ends = torch.arange(2, dtype=torch.float64)
        z = self.schedule.noised(u, ends[1].expand(len(u)), random.normal("noise at the end", (self.dim,)))
        prior = prior_divergence(u, self.schedule.log_snr(ends[0])).mean()
        return self.classifier(z), {"prior": prior, "denoising": self.eta / 2 * (weight * error).mean()}


class NoPropDT(Diffused):
    """Discrete time: T untied blocks, block t from z_{t-1} to z_t; each training step trains one, drawn uniformly.

    Inference takes at most T steps; after fewer, the class is predicted from z as it is. metrics: the loss terms.
    """

    name = "noprop-dt"

    def terms(self, u: Embedded, e: Tensor, rows: Rows, random: StepRandom) -> tuple[Tensor, dict[str, Tensor]]:
        block = random.decide(
            "block", lambda step: int(torch.randint(self.num_blocks, (), generator=step.lockstep("block"))))
        return self.terms_of(block, u, e, rows, random)

    def decisions(self) -> list[tuple[float, dict[str, Any]]]:
        layers = self.model.core_layers
        return [(layers.count(num) / len(layers), {"block": layers.index(num)}) for num in dict.fromkeys(layers)]

    def terms_of(self, block: int, u: Embedded, e: Tensor, rows: Rows,
                 random: StepRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """`terms` with `block`, counted from 0, as the active block."""
        log_snr = self.log_snr()
        t = torch.full((len(u),), block / self.num_blocks, dtype=torch.float64)
        z = self.schedule.noised(u, t, random.normal("noise", (self.dim,)))
        error = (self.estimate(z, e, rows.having(block=block)) - u).square().sum(-1)
        return self.bound(u, error, self.num_blocks * float(log_snr.exp().diff()[block]), random)

    @property
    def num_blocks(self) -> int:
        return self.model.recurrence.num_blocks

    def log_snr(self) -> Tensor:
        """The log SNR at times 0, 1, ..., T."""
        times = torch.arange(self.num_blocks + 1, dtype=torch.float64) / self.num_blocks
        return self.schedule.log_snr(times)

    def num_steps(self, depth: int) -> int:
        return min(depth, self.num_blocks)

    def step(self, z: Embedded, e: Tensor, rows: Rows, depth: int, index: int, draw: Tensor) -> Embedded:
        a, b, c = (each[index].to(z) for each in posterior(*self._pairs()))
        return a * self.estimate(z, e, rows.having(block=index)) + b * z + c.sqrt() * draw

    def _pairs(self) -> tuple[Tensor, Tensor]:
        log_snr = self.log_snr()
        return log_snr[:-1], log_snr[1:]


class NoPropCT(Diffused):
    """Continuous time: the core receives the time; any number of steps."""

    name = "noprop-ct"

    def terms(self, u: Embedded, e: Tensor, rows: Rows, random: StepRandom) -> tuple[Tensor, dict[str, Tensor]]:
        t = random.stratified("time")
        z = self.schedule.noised(u, t, random.normal("noise", (self.dim,)))
        error = (self.estimate(z, e, rows, level=t) - u).square().sum(-1)
        return self.bound(u, error, self.schedule.snr_slope(t).to(error), random)

    def step(self, z: Embedded, e: Tensor, rows: Rows, depth: int, index: int, draw: Tensor) -> Embedded:
        t, later = (torch.full((), each / depth, dtype=torch.float64) for each in (index, index + 1))
        u = self.estimate(z, e, rows, level=t.expand(len(z)))
        if self.config.solver == "euler":
            return z + self.schedule.flow(z, u, t) / depth
        a, b, c = (each.to(z) for each in posterior(self.schedule.log_snr(t), self.schedule.log_snr(later)))
        return a * u + b * z + c.sqrt() * draw


class NoPropFM(NoProp):
    """Flow matching: the network predicts the velocity of z; any number of Euler steps.

    The cross-entropy at the predicted end point keeps learned embeddings distinct. The velocity is not a mean of
    embeddings, so a separate linear map replaces the model's head, which stays frozen.
    """

    name = "noprop-fm"

    def __init__(self, model: LanguageModel, config: NoPropConfig):
        super().__init__(model, config)
        self.out_proj: nn.Linear = nn.Linear(model.width, self.dim)
        for unread in (model.embed.weight, model.head_weight):
            unread.requires_grad_(False)

    def terms(self, u: Embedded, e: Tensor, rows: Rows, random: StepRandom) -> tuple[Tensor, dict[str, Tensor]]:
        t, start = random.stratified("time"), random.normal("noise", (self.dim,)).to(u)
        share = t.to(u).unsqueeze(-1)
        z = share * u + (1 - share) * start
        v = self.velocity(z, e, rows, t)
        return self.classifier(z + (1 - share) * v), {"flow": self.eta * (v - (u - start)).square().sum(-1).mean()}

    def velocity(self, z: Embedded, e: Tensor, rows: Rows, t: Float[Tensor, "batch"]) -> Embedded:
        """dz/dt."""
        return self.out_proj(self.hidden(z, e, rows, level=t)).to(z)

    def step(self, z: Embedded, e: Tensor, rows: Rows, depth: int, index: int, draw: Tensor) -> Embedded:
        t = torch.full((len(z),), index / depth, dtype=torch.float64)
        return z + self.velocity(z, e, rows, t) / depth
