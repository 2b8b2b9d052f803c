"""Log generative perplexity: the loss in nats/token of another model, the judge, on generated text.

A judge rewards repetition: "the the the" has a low loss. So its loss is reported with distinct-n, and two sets of texts
are comparable only at equal distinct-n. The judge should have another seed than the writer. Its loss on real text is
the level to reach, not to undercut.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from looped.errors import UserError
from looped.evaluation.likelihood import next_token_losses
from looped.evaluation.metric_rows import Row, summarise
from looped.inference.rollout import rollout_of
from looped.inference.sequence_batch import NOTHING, Texts, as_lists, per_token
from looped.objectives.base import Objective
from looped.tensor_types import Float, Int

BATCH = 64
"""Texts per batch."""


@dataclass(frozen=True)
class Judged:
    """`nats`: sum over each text. `counts`: tokens of each text, in the writer's tokenizer."""

    nats: Float[Tensor, "num"]
    counts: Int[Tensor, "num"]

    @property
    def per_token(self) -> Float[Tensor, "num"]:
        """Nats/token, one value per text; their mean is the mean over all tokens, however unequal the texts are."""
        return per_token(self.nats, self.counts)


@runtime_checkable
class Reader(Protocol):
    """Interface of a judge: a run of this toolkit (`Judge`), or a Hub model (`looped.hub`)."""

    name: str

    def read(self, prompts: Int[Tensor, "num prompt"], texts: Texts) -> "Judged":
        """Score each text, given its prompt."""


def continuation(decode: Callable[[Sequence[int]], str], prompt: Sequence[int], text: Sequence[int]) -> tuple[str, int]:
    """(decoded prompt and text, index of the text's first character). A character that the prompt leaves incomplete
    belongs to the text."""
    before, whole = decode(prompt), decode([*prompt, *text])
    return whole, next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))


def judged_rows(judge: Reader, prompts: Int[Tensor, "num prompt"], texts: Texts,
                decode: Callable[[Sequence[int]], str], *, suffix: str = "", depth: int | None = None) -> list[Row]:
    """`judged_nats`, per token of the writer, and `judged_bits_per_byte`, total bits over total bytes of the texts."""
    found, fields = judge.read(prompts, texts), {"depth": depth, "by": judge.name}
    wholes = (continuation(decode, *pair) for pair in zip(prompts.tolist(), as_lists(texts), strict=True))
    sizes = torch.tensor([len(whole[start:].encode()) for whole, start in wholes])
    return [summarise(f"judged_nats{suffix}", found.per_token, **fields),
            summarise(f"judged_bits_per_byte{suffix}", per_token(found.nats / math.log(2), sizes), **fields)]


@dataclass(frozen=True)
class Judge:
    """A trained model as judge, at one depth. `vocabulary`: its tokenizer's JSON, which writers must share."""

    name: str
    objective: Objective
    depth: int
    vocabulary: str

    def __post_init__(self) -> None:
        together = rollout_of(self.objective).tokens_at_once
        if together > 1:
            raise UserError(f"judge {self.name} denoises blocks of {together} tokens, and "
                            f"would read past the end of a text; choose a run of --objective ar")

    def check(self, writer: str, vocabulary: str) -> None:
        """Raises UserError if the writer has another tokenizer than the judge."""
        if vocabulary != self.vocabulary:
            raise UserError(f"judge {self.name} has another tokenizer than {writer}; choose a run trained on the same "
                            f"text with the same data settings")

    def read(self, prompts: Int[Tensor, "num prompt"], texts: Texts) -> Judged:
        """Score each text, its end-of-text token included, given its prompt."""
        real = texts != NOTHING
        rows = torch.cat([prompts, texts.where(real, 0)], dim=1).split(BATCH)  # causal: no row sees a later one
        losses = torch.cat([next_token_losses(self.objective, part, self.depth) for part in rows])
        nats = (losses[:, prompts.shape[1] - 1 :] * real).cpu().double().sum(1)
        return Judged(nats, real.sum(1).cpu())
