"""Autoregressive generation: one token, or one block of tokens, at a time."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from looped.devices import widest
from looped.diffusion.clean_estimate import draw
from looped.diffusion.sampling_params import SamplingParams
from looped.inference.padding import Draws, Padding
from looped.inference.sequence_batch import NOTHING, Ending
from looped.rng import StepRandom
from looped.tensor_types import Int


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


CHECK_EVERY = 8
"""Tokens that a device writes until the host reads whether the texts have ended, for which it waits."""


def one_after_another(writer: Writer, prompt: Int[Tensor, "batch length"], num_tokens: int,
                      way: Writing) -> Int[Tensor, "batch {num_tokens}"]:
    """Generate token by token, or block by block, until all texts have ended; then `NOTHING`. Texts on a device may go
    on for `CHECK_EVERY` tokens after their ends."""
    texts = prompt.new_full((len(prompt), num_tokens), NOTHING)
    every = 1 if prompt.device.type == "cpu" else CHECK_EVERY
    new, step, num, checked, over = prompt, 0, 0, 0, [False] * len(prompt)
    while num < num_tokens and not all(over):
        random = way.draws(step)
        probs = torch.softmax(writer.next_logits(new, random).to(widest(prompt.device)), dim=-1)  # B k V
        new, step = draw(probs, random.uniform("token", probs.shape[1:2])), step + 1
        first, num = num, min(num + new.shape[1], num_tokens)
        texts[:, first:num] = new[:, : num - first]
        if num - checked >= every and num < num_tokens and not way.ending.never:
            tails = texts[:, max(num - way.ending.reach(num - checked), 0) : num]
            over = [before or now for before, now in zip(over, way.ending.over(tails), strict=True)]
            checked = num
    return texts
