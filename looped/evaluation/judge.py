"""Generated text read by another model: its loss on the text, a token (log generative perplexity).

A judge rewards repetition: "the the the" is cheap. So its figure stands beside distinct-n, and two sets of texts can
be compared only where these agree. The judge should come from another seed than the writer; what it says of real text
is the level to reach, not to undercut.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from looped.errors import UserError
from looped.evaluation.likelihood import next_token_losses
from looped.evaluation.rows import Row, summarise
from looped.objectives.base import Objective

BATCH = 64
"""Texts that are read at once."""


@runtime_checkable
class Reader(Protocol):
    """Who can judge: a run of this toolkit (`Judge`), or a model of another (`looped.hub`)."""

    name: str

    def losses(self, prompts: Int[Tensor, "num prompt"], texts: Int[Tensor, "num length"]) -> Float[Tensor, "num"]:
        """Nats of each text after its prompt, a token of the writer."""


def continuation(decode: Callable[[Sequence[int]], str], prompt: Sequence[int], text: Sequence[int]) -> tuple[str, int]:
    """(prompt and text as one, the character where the text begins): a character that the prompt leaves incomplete is
    the text's."""
    before, whole = decode(prompt), decode([*prompt, *text])
    return whole, next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))


def judged_rows(judge: Reader, prompts: Int[Tensor, "num prompt"], texts: Int[Tensor, "num length"],
                decode: Callable[[Sequence[int]], str], *, suffix: str = "", depth: int | None = None) -> list[Row]:
    """`judged_nats`, a token of the writer, and `judged_bits_per_byte`, those of all texts over all their bytes."""
    losses, fields = judge.losses(prompts, texts), {"depth": depth, "by": judge.name}
    wholes = (continuation(decode, *pair) for pair in zip(prompts.tolist(), texts.tolist(), strict=True))
    sizes = torch.tensor([len(whole[start:].encode()) for whole, start in wholes], dtype=torch.float64)
    bits = losses * texts.shape[1] / math.log(2)
    ratio = bits.sum() / sizes.sum().clamp(min=1)
    by_text = ratio + (bits - ratio * sizes) / sizes.mean().clamp(min=1)  # of the ratio's mean and spread
    return [summarise(f"judged_nats{suffix}", losses, **fields),
            summarise(f"judged_bits_per_byte{suffix}", by_text, **fields)]


@dataclass(frozen=True)
class Judge:
    """A trained model that reads at one depth; `vocabulary` is its tokenizer's JSON, which writers must share."""

    name: str
    objective: Objective
    depth: int
    vocabulary: str

    def check(self, writer: str, vocabulary: str) -> None:
        """Raises UserError where token ids of the writer mean something else to the judge."""
        if vocabulary != self.vocabulary:
            raise UserError(f"judge {self.name} has another tokenizer than {writer}; choose a run trained on the same "
                            f"text with the same data settings")

    def losses(self, prompts: Int[Tensor, "num prompt"], texts: Int[Tensor, "num length"]) -> Float[Tensor, "num"]:
        """Mean nats a token of each text after its prompt."""
        rows = torch.cat([prompts, texts], dim=1).split(BATCH)
        losses = torch.cat([next_token_losses(self.objective, part, self.depth) for part in rows])
        return losses[:, prompts.shape[1] - 1 :].mean(1).double().cpu()
