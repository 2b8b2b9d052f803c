"""Sampling parameters for text: temperature, top-k and top-p on a distribution over tokens.

A denoiser applies them at every noise level, before the evidence of z is added. The closed-form part of the posterior
then makes the solver sample from the changed distribution; applying them to the last readout alone would have no
effect, since z has fixed the tokens by then.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from looped.errors import UserError
from looped.tensor_types import Float


@dataclass(frozen=True)
class SamplingParams:
    """`temperature` divides the logits (0, or too small to divide by: only the most likely token is kept); then only
    the `top_k` most likely tokens are kept, and of these the smallest set with total probability `top_p` (Holtzman et
    al. 2020). Raises UserError."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature} is negative or not a number; "
                            f"use 0 for the most likely token, 1 for plain sampling")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k {self.top_k} leaves no token; use 1 or more, or leave it out")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is not in (0, 1]; use 1 to keep every token")

    def __call__(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of the changed distribution, at least float32; excluded tokens have -inf."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        likeliest = self.temperature < torch.finfo(torch.float32).tiny  # dividing by it would be dividing by zero
        num_kept = 1 if likeliest else self.top_k
        if not likeliest and self.temperature != 1:
            logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature  # the largest cannot overflow
        if num_kept is not None and num_kept < logits.shape[-1]:
            logits = _only(logits, logits.topk(num_kept, dim=-1).indices)
        return self._nucleus(logits) if self.top_p < 1 else logits

    def _nucleus(self, logits: Tensor) -> Tensor:
        ordered, places = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= self.top_p  # the tokens before it suffice
        return logits.masked_fill(outside.gather(-1, places.argsort(-1)), -math.inf)


def _only(logits: Tensor, places: Tensor) -> Tensor:
    return torch.full_like(logits, -math.inf).scatter(-1, places, logits.gather(-1, places))
