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
from looped.inference.rollout import rollout_of
from looped.inference.texts import NOTHING, Texts, as_lists, per_token
from looped.objectives.base import Objective

BATCH = 64
"""Texts that are read at once."""


@dataclass(frozen=True)
class Judged:
    """`nats` of each text, and the `counts` of the writer's tokens that they are of."""

    nats: Float[Tensor, "num"]
    counts: Int[Tensor, "num"]

    @property
    def per_token(self) -> Float[Tensor, "num"]:
        """Nats by token, a figure a text; their mean is that of all tokens, however unequal the texts are."""
        return per_token(self.nats, self.counts)


@runtime_checkable
class Reader(Protocol):
    """Who can judge: a run of this toolkit (`Judge`), or a model of another (`looped.hub`)."""

    name: str

    def read(self, prompts: Int[Tensor, "num prompt"], texts: Texts) -> "Judged":
        """Each text after its prompt."""


def continuation(decode: Callable[[Sequence[int]], str], prompt: Sequence[int], text: Sequence[int]) -> tuple[str, int]:
    """(prompt and text as one, the character where the text begins): a character that the prompt leaves incomplete is
    the text's."""
    before, whole = decode(prompt), decode([*prompt, *text])
    return whole, next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))


def judged_rows(judge: Reader, prompts: Int[Tensor, "num prompt"], texts: Texts,
                decode: Callable[[Sequence[int]], str], *, suffix: str = "", depth: int | None = None) -> list[Row]:
    """`judged_nats`, a token of the writer, and `judged_bits_per_byte`, those of all texts over all their bytes."""
    found, fields = judge.read(prompts, texts), {"depth": depth, "by": judge.name}
    wholes = (continuation(decode, *pair) for pair in zip(prompts.tolist(), as_lists(texts), strict=True))
    sizes = torch.tensor([len(whole[start:].encode()) for whole, start in wholes])
    return [summarise(f"judged_nats{suffix}", found.per_token, **fields),
            summarise(f"judged_bits_per_byte{suffix}", per_token(found.nats / math.log(2), sizes), **fields)]


@dataclass(frozen=True)
class Judge:
    """A trained model that reads at one depth; `vocabulary` is its tokenizer's JSON, which writers must share."""

    name: str
    objective: Objective
    depth: int
    vocabulary: str

    def __post_init__(self) -> None:
        together = rollout_of(self.objective).tokens_at_once
        if together > 1:
            raise UserError(f"judge {self.name} denoises blocks of {together} tokens, and "
                            f"would read what stands after the end of a text; choose a run of --objective ar")

    def check(self, writer: str, vocabulary: str) -> None:
        """Raises UserError where token ids of the writer mean something else to the judge."""
        if vocabulary != self.vocabulary:
            raise UserError(f"judge {self.name} has another tokenizer than {writer}; choose a run trained on the same "
                            f"text with the same data settings")

    def read(self, prompts: Int[Tensor, "num prompt"], texts: Texts) -> Judged:
        """Each text after its prompt, its end of text included."""
        real = texts != NOTHING
        rows = torch.cat([prompts, texts.where(real, 0)], dim=1).split(BATCH)  # no row sees a later one
        losses = torch.cat([next_token_losses(self.objective, part, self.depth) for part in rows])
        nats = (losses[:, prompts.shape[1] - 1 :] * real).cpu().double().sum(1)
        return Judged(nats, real.sum(1).cpu())
