"""Single-pass denoising: one forward and one backward pass of the core at a sampled noise level (DiffusionBlocks).

    y = target(next token), z = y + sigma eps, loss = w(sigma) * cross-entropy(denoiser(z, sigma, encode(tokens)), y)

The clean context reaches the noisy rows in one of three ways (`denoise.context`): injected into the state, as a clean
copy that runs alongside, or as keys and values of the prelude's output.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from looped.config import Config
from looped.config.blocks import BlocksConfig
from looped.config.denoise import DenoiseConfig
from looped.data.batch import Batch
from looped.devices import to_device, widest
from looped.diffusion.clean_estimate import bridge
from looped.diffusion.denoiser import MEMBERS, Denoiser, require_members
from looped.diffusion.edm import align
from looped.diffusion.noise import Noise
from looped.diffusion.noise_from_config import edges_of, noise_from_config
from looped.diffusion.samplers import ancestral_step
from looped.models.language import LanguageModel
from looped.nn.masks import CleanNoisy, CleanNoisyBlocks, SameDocument
from looped.nn.rows import Rows
from looped.objectives.base import Loss, Objective, head_losses, rows_of_batch
from looped.rng import StepRandom
from looped.tensor_types import Float, Int


class TrainedPath(NamedTuple):
    """The way of z through several trained steps. aim: (soft estimate, truth) -> the clean rows that a step moves to;
    estimates: the soft estimate of a step is needed, for the way or for the carry."""

    aim: Callable[[Tensor | None, Tensor], Tensor]
    estimates: bool


def path_of(config: DenoiseConfig) -> TrainedPath:
    """The path of `denoise.path`: by the network's own estimates, as a solver goes, or by the truth, as the bound
    does."""
    if config.path == "truth":
        return TrainedPath(lambda estimate, truth: truth, config.carry == "estimate")
    return TrainedPath(lambda estimate, truth: estimate, True)


FIRST_SHARE = 0.5
"""Fraction of the steps that begin with an evaluation without gradient, to get a carry or to choose the fixed cells."""

NUM_BINS = 6
"""Number of bins of equal width in ln sigma for which the loss is logged."""


ONE_BLOCK = BlocksConfig()
"""A weight-tied core."""


def only_sought(z: Float[Tensor, "batch length dim"], batch: Batch) -> Float[Tensor, "batch length dim"]:
    """z in the rows to predict, and 0 in the others: given tokens need no noisy copy."""
    return z if batch.scored is None else z * batch.scored.unsqueeze(-1)


def reads_first(random: StepRandom) -> bool:
    """True if this step begins with an evaluation without gradient (`FIRST_SHARE`)."""
    return random.decide("first reading",
                         lambda step: float(torch.rand((), generator=step.lockstep("carry"))) < FIRST_SHARE)


def carried_readings(config: DenoiseConfig) -> float:
    """Mean number of evaluations per training step that only provide the carry."""
    return FIRST_SHARE if config.carry != "none" and config.train_steps == 1 else 0.0


def settling_readings(config: DenoiseConfig) -> float:
    """Mean number of evaluations per training step that choose the fixed cells."""
    return FIRST_SHARE if config.settled == "surest" else 0.0


def by_bin(short: str, sigma: Float[Tensor, "*rows"], losses: Float[Tensor, "*rows"], noise: Noise,
           counted: Tensor | None = None) -> dict[str, Float[Tensor, "2"]]:
    """(sum of the losses, their number) at sigma_max and per bin of ln sigma, over sequences or over tokens. counted:
    mask of those that count; None: all. Levels are on the host, losses anywhere; nothing is read from the device."""
    place = ((sigma / noise.sigma_min).log() / math.log(noise.sigma_max / noise.sigma_min) * NUM_BINS).long()
    place = torch.where(sigma >= noise.sigma_max, NUM_BINS, place.clamp(0, NUM_BINS - 1))
    bins = torch.arange(NUM_BINS + 1, device=losses.device).view(-1, *[1] * place.ndim)
    belongs = to_device(place, losses.device) == bins  # bin, then the rows
    belongs = belongs if counted is None else belongs & counted
    sums = torch.where(belongs, losses.detach(), 0).flatten(1).sum(1)
    pairs = torch.stack([sums, belongs.flatten(1).sum(1)], dim=1)
    return {f"{short}_{name}": pair for name, pair in zip([*(f"bin{b}" for b in range(NUM_BINS)), "at_max"], pairs,
                                                          strict=True)}


class Denoise(Objective):
    """The single-pass rule, for text and for problems."""

    rollout = "solver"
    figure = "cross_entropy"
    short = "ce"
    """The metric's name in the log, and its short name per level and block."""

    @classmethod
    def from_config(cls, config: Config, model: nn.Module) -> Objective:
        return cls(model, config.denoise)

    def __init__(self, model: LanguageModel, config: DenoiseConfig, blocks: BlocksConfig = ONE_BLOCK):
        super().__init__()
        require_members(model, MEMBERS, "the training rule denoise")
        self.config = config
        noise = noise_from_config(config.noise)
        self.denoiser: Denoiser = Denoiser(model, config, edges=edges_of(blocks, noise) if blocks.num > 1 else None)
        self.noise = noise

    @property
    def path(self) -> TrainedPath:
        """The way of z through several trained steps (`denoise.path`)."""
        return path_of(self.config)

    @property
    def changes(self) -> str:
        return "the distribution of noise levels is learned from the losses" if self.noise.learns else ""

    @property
    def model(self) -> LanguageModel:
        return self.denoiser.model

    def forward(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Loss:
        batch = self.ask(tokens)
        return self.loss_at(batch, self.levels(random, batch.targets.shape[1]), random)

    def loss_at(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, sigma: Tensor, random: StepRandom,
                block: int | None = None) -> Loss:
        """The loss at given levels (B,) or (B, L); `block`: the block of the core to run, if there are several."""
        batch = self.ask(tokens)
        rows = rows_of_batch(batch)
        e = self.model.encode(batch.inputs, rows)
        if self.config.context_dropout and self.training:
            e = self.denoiser.without(e, random.uniform("context dropped", ()) < self.config.context_dropout)
        if self.config.settled == "surest" and reads_first(random):
            sigma = self._levels_surest_settled(e, batch, random, rows)
        losses = self._losses(e, batch, sigma, random, rows, block)  # B L
        by_level = losses.detach() if sigma.ndim == 2 else batch.mean(losses.detach())
        counted = batch.scored if sigma.ndim == 2 else None
        if self.training:
            self.noise.observe(sigma, by_level, counted)
        value = batch.mean(align(to_device(self.weight(sigma), losses.device), losses) * losses).mean()
        metrics = {"loss": value.detach(), self.figure: batch.mean(losses.detach()).mean()}
        return Loss(value, metrics, by_bin(self.short, sigma, by_level, self.noise, counted))

    def levels(self, random: StepRandom, length: int) -> Tensor:
        """Noise levels of a training step: (B,), or (B, L) under an order, which sets a level per token."""
        if self.config.order == "left-to-right":
            return self._levels_in_order(random, length)
        sigma = self.noise.sample(random.stratified("sigma"))
        return self._levels_partly_settled(sigma, random, length) if self.config.order == "confidence" else sigma

    def _levels_in_order(self, random: StepRandom, length: int) -> Tensor:
        """The levels of a left-to-right solver: in each block one active row at a random level, earlier rows at
        sigma_min and later rows at sigma_max."""
        block, noise = self.config.block_size, self.noise
        active = (random.uniform("row at work", (length // block,)) * block).long().unsqueeze(-1)  # B N 1
        level = noise.sample(random.uniform("sigma of tokens", (length // block,))).unsqueeze(-1)
        place = torch.arange(block, device=level.device)
        sigma = torch.where(place < active, noise.sigma_min, torch.where(place > active, noise.sigma_max, level))
        return sigma.flatten(1)  # B N k -> B L

    def _levels_partly_settled(self, sigma: Tensor, random: StepRandom, length: int) -> Tensor:
        """The levels of a solver that fixes cells one after another: a random fraction of the cells, spread evenly over
        the batch, at sigma_min, the others at one level."""
        share = random.stratified("share settled").unsqueeze(1)
        settled = random.uniform("settled", (length,)) < share
        return torch.where(settled, self.noise.sigma_min, sigma.unsqueeze(1))

    @torch.no_grad()
    def _levels_surest_settled(self, e: Tensor, batch: Batch, random: StepRandom,
                               rows: Rows) -> Float[Tensor, "batch length"]:
        """`_levels_partly_settled`, fixing the cells that the model is most confident of when none is fixed: a solver
        fixes those first, and the remaining cells are harder than a random subset."""
        highest = torch.full((len(batch),), self.noise.sigma_max, dtype=torch.float64)
        z = self.noise.sigma_max * random.normal("noise of a first reading", (e.shape[1], self.denoiser.targets.dim))
        logits = self.denoiser(only_sought(z, batch), highest, e, rows)
        sure = self._sureness(logits).masked_fill(~batch.sought, -1.0)
        place, num = sure.argsort(1, descending=True).argsort(1), batch.sought.sum(1)
        share, level = random.stratified("share settled"), self.noise.sample(random.stratified("sigma"))
        share = to_device(share.to(widest(num.device)), num.device)
        settled = (place < (share * num).round().unsqueeze(1)).cpu()  # the one read of a forward pass: levels follow
        return torch.where(settled, self.noise.sigma_min, level.unsqueeze(1))

    @staticmethod
    def _sureness(logits: Float[Tensor, "batch length vocab"]) -> Float[Tensor, "batch length"]:
        """The probability of the most likely token."""
        return logits.softmax(-1).amax(-1)

    def without_values(self) -> None:
        """Fix cells in random order, which costs the same."""
        self._sureness = lambda logits: torch.rand(logits.shape[:-1])

    def _losses(self, e: Tensor, batch: Batch, sigma: Tensor, random: StepRandom, rows: Rows,
                block: int | None = None) -> Float[Tensor, "batch length"]:
        """Cross-entropy of the clean tokens, averaged over the trained solver steps."""
        y = batch.targets
        rows = self.noisy_rows(e, batch, rows.having(block=block))
        target = self.denoiser.target(y)
        z, carry = self._start(e, batch, target, sigma, random, rows)
        levels = self._falling(sigma, self._trained_steps(random))
        state, hidden = self.denoiser.trace(z, sigma, e, rows, carry=carry)
        losses = [self._read_out(hidden, y, z, sigma)]
        for step, (level, lower) in enumerate(itertools.pairwise(levels), start=1):
            D = self._estimate(hidden, z, level) if self.path.estimates else None
            carry = self.denoiser.handed_on(state, D)
            z = ancestral_step(z, self.path.aim(D, target), level, lower,
                               random.normal(f"noise{step}", target.shape[1:]))
            z = only_sought(z, batch)
            state, hidden = self.denoiser.trace(z, lower, e, rows, carry=carry)
            losses.append(self._read_out(hidden, y, z, lower))
        return torch.stack(losses).mean(0)

    def _start(self, e: Tensor, batch: Batch, target: Tensor, sigma: Tensor, random: StepRandom,
               rows: Rows) -> tuple[Float[Tensor, "batch length dim"], Tensor | None]:
        """(z, the carry) at the first trained step."""
        z = self._noised(target, batch, sigma, random)
        return z, self._carry_of_a_first_reading(z, sigma, e, random, rows)

    @staticmethod
    def _noised(target: Tensor, batch: Batch, sigma: Tensor, random: StepRandom) -> Float[Tensor, "batch length dim"]:
        scale = to_device(align(sigma, target).float(), target.device)
        return only_sought(target + scale * random.normal("noise", target.shape[1:]), batch)

    def _estimate(self, hidden: Tensor, z: Tensor, sigma: Tensor) -> Float[Tensor, "batch length dim"]:
        """The soft estimate of the clean rows."""
        return bridge("soft", self.denoiser.logits(hidden, z, sigma), self.denoiser.table())

    def _read_out(self, hidden: Tensor, y: Int[Tensor, "batch length"], z: Tensor,
                  sigma: Tensor) -> Float[Tensor, "batch length"]:
        """Cross-entropy of the logits of `hidden`, which are never all in memory."""
        evidence = self.denoiser.evidence(z, sigma) if self.config.posterior else None
        return head_losses(self.model, hidden, y, scale=self.denoiser.logit_scale, evidence=evidence)

    def _carry_of_a_first_reading(self, z: Tensor, sigma: Tensor, e: Tensor, random: StepRandom,
                                  rows: Rows) -> Tensor | None:
        """The carry of a first evaluation without gradient, in half of the steps, so that the only trained step learns
        both to start and to continue (Chen et al. 2022, "Analog bits", section 3.2). Several trained steps need none.
        """
        alone = self.config.train_steps > 1 or self.config.carry == "none"
        if alone or not reads_first(random):
            return None
        with torch.no_grad():
            return self.denoiser.read(z, sigma, e, rows)[1]

    def _trained_steps(self, random: StepRandom) -> int:
        """The number of solver steps of this training step: `train_steps`, or at random from 1 to that."""
        most = self.config.train_steps
        if not self.config.train_steps_drawn:
            return most
        return random.decide("trained steps", lambda step: int(torch.randint(
            1, most + 1, (), generator=step.lockstep("trained steps"))))

    def _falling(self, sigma: Tensor, num: int | None = None) -> list[Tensor]:
        """The levels of `num` solver steps (None: `train_steps`) from sigma down, at even parts of the probability mass
        below it."""
        num, noise = self.config.train_steps if num is None else num, self.noise.continuous
        mass = noise.cdf(sigma) if num > 1 else None
        return [sigma, *(noise.quantile(mass * (1 - step / num)) for step in range(1, num))]

    def noisy_rows(self, e: Tensor, batch: Batch, rows: Rows) -> Rows:
        """Attention inputs of the noisy copy of a batch: `rows` of the clean batch (`rows_of_batch`) plus the clean
        context and, if documents are separate, the mask over both."""
        context = self.model.make_context(e, self.config.context, rows)
        if context is not None and batch.documents is not None:
            length, block_size = batch.documents.shape[1], self.config.block_size
            mask = CleanNoisyBlocks(length, block_size) if block_size > 1 else CleanNoisy(length)
            rows = rows.having(mask=mask & SameDocument(batch.documents))
        return rows.having(context=context)

    def ask(self, tokens: Int[Tensor, "batch length_and_one"] | Batch) -> Batch:
        """As for every rule, but if a document ends within a block of tokens, the next document's tokens in it are not
        scored: the e injected into their rows would come from the previous document."""
        batch, block_size = super().ask(tokens), self.config.block_size
        if batch is tokens or batch.documents is None or block_size == 1:
            return batch
        firsts = batch.documents[:, ::block_size].repeat_interleave(block_size, dim=1)
        return replace(batch, scored=batch.documents == firsts)

    def encoded(self, batch: Batch) -> tuple[Tensor, Rows]:
        """(e, `rows` of the noisy copy) of a batch."""
        rows = rows_of_batch(batch)
        e = self.model.encode(batch.inputs, rows)
        return e, self.noisy_rows(e, batch, rows)

    def logits(self, x: Int[Tensor, "batch length"] | Batch, z: Tensor, sigma: Tensor) -> Tensor:
        """Logits of the token after each of `x`, from its noised target in z and the clean tokens so far; or of the
        targets of a batch."""
        batch = x if isinstance(x, Batch) else self.ask(torch.cat([x, x[:, -1:]], dim=1))  # the targets are not used
        e, rows = self.encoded(batch)
        return self.denoiser(z, sigma, e, rows)

    def weight(self, sigma: Tensor) -> Tensor:
        """w(sigma): one, or EDM's, which over-weights the trivial low-noise end of a cross-entropy."""
        if self.config.weight == "none":
            return torch.ones_like(sigma, dtype=torch.float32)
        return self.denoiser.edm.weight(sigma)

    def after_step(self) -> None:
        self.noise.update()

    def decisions(self) -> list[tuple[float, dict[str, Any]]]:
        if self.config.train_steps_drawn:  # several trained steps need no first reading
            most = self.config.train_steps
            return [(1 / most, {"trained steps": num}) for num in range(1, most + 1)]
        if not self.first_readings:
            return super().decisions()
        return [(FIRST_SHARE, {"first reading": True}), (1 - FIRST_SHARE, {"first reading": False})]

    @property
    def reading_layers(self) -> float:
        """Mean number of core layers per network evaluation in training."""
        return self.over_blocks(self.model.core_layers)

    def over_blocks(self, layers: Sequence[float]) -> float:
        """The mean over steps of a number for each block of the core, summed over the blocks that a step runs."""
        return sum(layers)

    @property
    def first_readings(self) -> float:
        """Mean number of evaluations without gradient that a training step may begin with (`reads_first`)."""
        return carried_readings(self.config) + settling_readings(self.config)

    @property
    def first_layers(self) -> float:
        """Mean number of layer forwards, without gradient, of the evaluations before the trained ones."""
        return self.first_readings * (self.reading_layers + self.model.num_coda_layers)

    @property
    def clean_coda_layers(self) -> int:
        """Layers of the coda that clean rows run under `denoise.context concat`: all but the last, which makes keys and
        values of them alone."""
        return max(self.model.num_coda_layers - 1, 0) if self.config.context == "concat" else 0

    def layer_forwards(self) -> float:
        c, config = self.model, self.config
        solver = self.reading_layers + c.num_coda_layers
        clean = self.clean_coda_layers
        if config.context == "concat":  # clean rows also run through the core
            clean += self.over_blocks(self.denoiser.clean_layers)
        steps = (1 + config.train_steps) / 2 if config.train_steps_drawn else config.train_steps
        return 3.0 * (c.num_prelude_layers + clean + steps * solver) + self.first_layers
