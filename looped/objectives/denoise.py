"""Single-pass denoising: one forward and one backward pass of the core at a sampled noise level (DiffusionBlocks).

    y = target(next token), z = y + sigma eps, loss = w(sigma) * cross-entropy(denoiser(z, sigma, encode(tokens)), y)

The clean context reaches the noisy rows in one of three ways (`denoise.context`): injected into the state, as a clean
copy that runs beside it, or as keys and values of the prelude's output.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from looped.config import DenoiseConfig
from looped.diffusion.denoiser import Denoiser
from looped.diffusion.noise import noise_from_config
from looped.models.language import LanguageModel
from looped.objectives.base import Loss, Objective, head_losses
from looped.rng import StepRandom

NUM_BINS = 6
"""Bins of equal width in ln sigma that the log reports the loss by."""


class Denoise(Objective):
    """The single-pass rule for a language model."""

    def __init__(self, model: LanguageModel, config: DenoiseConfig):
        super().__init__()
        self.config = config
        self.denoiser = Denoiser(model, config)
        self.noise = noise_from_config(config.noise)

    @property
    def model(self) -> LanguageModel:
        return self.denoiser.model

    def forward(self, tokens: Int[Tensor, "batch length_and_one"], random: StepRandom) -> Loss:
        x, y = tokens[:, :-1], tokens[:, 1:]
        sigma = self.noise.sample(random.stratified("sigma"))
        target = self.denoiser.target(y)
        z = target + sigma.float()[:, None, None] * random.normal("noise", target.shape[1:])
        losses = self.token_losses(x, y, z, sigma).mean(1)  # B
        if self.training:
            self.noise.observe(sigma, losses.detach())
        value = (self.weight(sigma) * losses).mean()
        metrics = {"loss": value.detach(), "cross_entropy": losses.detach().mean()}
        return Loss(value, metrics | self._bins(sigma, losses))

    def logits(self, x: Int[Tensor, "batch length"], z: Tensor, sigma: Tensor) -> Tensor:
        """Logits of the token after each of `x`, from its noised target in z and the clean tokens up to there."""
        e = self.model.encode(x)
        return self.denoiser(z, sigma, e, context=self.model.make_context(e, self.config.context))

    def token_losses(self, x: Int[Tensor, "batch length"], y: Int[Tensor, "batch length"], z: Tensor,
                     sigma: Tensor) -> Float[Tensor, "batch length"]:
        """`token_losses` of these logits, which are never held at once."""
        e = self.model.encode(x)
        hidden = self.denoiser.hidden(z, sigma, e, context=self.model.make_context(e, self.config.context))
        evidence = self.denoiser.evidence(z, sigma) if self.config.posterior else None
        return head_losses(self.model, hidden, y, scale=self.denoiser.logit_scale, evidence=evidence)

    def weight(self, sigma: Tensor) -> Tensor:
        """w(sigma): one, or EDM's, which over-weights the trivial low-noise end of a cross-entropy."""
        if self.config.weight == "none":
            return torch.ones_like(sigma, dtype=torch.float32)
        return self.denoiser.edm.weight(sigma)

    def _bins(self, sigma: Tensor, losses: Tensor) -> dict[str, Tensor]:
        """Mean cross-entropy of the sequences at sigma_max, and by bin of ln sigma."""
        low, high = self.config.noise.sigma_min, self.config.noise.sigma_max
        at_max = sigma >= high
        place = ((sigma / low).log() / math.log(high / low) * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        groups = {"at_max": at_max} | {f"bin{b}": (place == b) & ~at_max for b in range(NUM_BINS)}
        return {f"ce_{name}": losses.detach()[rows].mean() for name, rows in groups.items() if rows.any()}

    def after_step(self) -> None:
        self.noise.update()

    def layer_forwards(self) -> float:
        c = self.model.config
        rows = 2 if self.config.context == "concat" else 1  # clean rows also run through core and coda
        return 3.0 * (c.num_prelude_layers + rows * (c.num_core_layers + c.num_coda_layers))
