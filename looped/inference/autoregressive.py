"""Autoregressive generation: one token, or one block of tokens, at a time."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from looped.devices import widest
from looped.diffusion.clean_estimate import draw
from looped.diffusion.sampling_params import SamplingParams
from looped.inference.padding import Draws, Padding
from looped.inference.sequence_batch import NOTHING, Ending
from looped.rng import StepRandom
from looped.shapes import Int


class Writer(Protocol):
    """A source of logits for the next tokens, which caches the columns it has processed."""

    def next_logits(self, new: Int[Tensor, "batch new"], random: StepRandom) -> Tensor:
        """Logits (B, k, V) of the tokens after the columns so far and the `new` ones."""


@dataclass(frozen=True)
class Writing:
    """Settings of generation. steering: temperature, top-k and top-p. padding: of the prompts. draws: random draws by
    step. ending: the end of a text."""

    steering: SamplingParams
    padding: Padding
    draws: Draws
    ending: Ending


def one_after_another(writer: Writer, prompt: Int[Tensor, "batch length"], num_tokens: int,
                      way: Writing) -> Int[Tensor, "batch {num_tokens}"]:
    """Generate token by token, or block by block, until all texts have ended; then `NOTHING`."""
    new, texts, step = prompt, prompt[:, :0], 0
    over = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    while texts.shape[1] < num_tokens and not bool(over.all()):
        random = way.draws(step)
        probs = torch.softmax(writer.next_logits(new, random).to(widest(prompt.device)), dim=-1)  # B k V
        new, step = draw(probs, random.uniform("token", probs.shape[1:2])), step + 1
        texts = torch.cat([texts, new], dim=1)
        over |= way.ending.over(texts[:, -way.ending.reach(new.shape[1]) :])
    texts = texts[:, :num_tokens]
    return pad(texts, (0, num_tokens - texts.shape[1]), value=NOTHING)
