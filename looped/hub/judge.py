"""A causal language model of transformers as judge: it reads text, so models with any tokenizer can be compared.

Prompt and continuation are decoded together and retokenized. The nats of a continuation are those of the judge's tokens
from the first one that extends beyond the prompt; a token across the boundary counts fully. End-of-text tokens are not
text: they are not counted, and the judge reads the documents on both sides of one as a single document.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from looped.errors import UserError
from looped.evaluation.judge import Judged, continuation
from looped.hub.loading import batches, load, max_length
from looped.inference.sequence_batch import Texts, as_lists
from looped.tensor_types import Float, Int

BATCH = 8
"""Texts per batch; logits over a large vocabulary dominate the memory."""


class HubJudge:
    """A model and its tokenizer as judge of another model's samples; `decode` (ids to text) and `end_of_text` are those
    of that other model.

    Raises `UserError` for models that `load` refuses, and for a model that is not causal.
    """

    def __init__(self, name: str, decode: Callable[[Sequence[int]], str], *, end_of_text: int | None = None,
                 device: str | torch.device = "cpu"):
        self.name = name
        self.decode = decode
        self.end_of_text = end_of_text
        self.model: Any
        self.tokenizer: Any
        self.model, self.tokenizer = load(name, "AutoModelForCausalLM")
        self.model.to(device)
        self._check_causal()

    @torch.no_grad()
    def _check_causal(self) -> None:
        """Raises `UserError` for a masked language model, which loads as a causal one but would see the answers."""
        ids = torch.tensor([[0, 1, 2], [0, 1, 3]], device=self.model.device)
        first, second = self.model(ids).logits[:, :2]
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-4):
            raise UserError(f"model {self.name} looks ahead: its predictions depend on later tokens; name a causal "
                            f"language model as the judge")

    def read(self, prompts: Int[Tensor, "num prompt"], texts: Texts) -> Judged:
        """Scores of each text after its prompt, without its end-of-text token."""
        rows = as_lists(texts)
        nats = self.nats([continuation(self.decode, *pair) for pair in zip(prompts.tolist(), rows, strict=True)])
        return Judged(nats, torch.tensor([sum(token != self.end_of_text for token in row) for row in rows]))

    @torch.no_grad()
    def nats(self, texts: Sequence[tuple[str, int]]) -> Float[Tensor, "num"]:
        """Nats of each (text, character) from that character on, in float64."""
        rows, firsts = zip(*(self.tokens(*pair) for pair in texts), strict=True)
        totals = []
        for ids, mask in batches(self.tokenizer, list(rows), BATCH):
            losses = self._token_losses(ids, mask)
            begins = torch.tensor(firsts[len(totals) : len(totals) + len(ids)]).unsqueeze(1)
            counted = (torch.arange(1, ids.shape[1]) >= begins) & mask[:, 1:].bool()
            totals += (losses * counted).sum(1).tolist()
        return torch.tensor(totals, dtype=torch.float64)

    def _token_losses(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "batch length"]:
        device = self.model.device
        logits = self.model(ids.to(device), attention_mask=mask.to(device)).logits[:, :-1].float()
        return cross_entropy(logits.transpose(1, 2), ids[:, 1:].to(device), reduction="none").cpu().double()

    def tokens(self, text: str, boundary: int) -> tuple[list[int], int]:
        """(ids of a text after the judge's start token, index of the first one that extends beyond `boundary`)."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        start = self.tokenizer.bos_token_id
        ids = ([start] if start is not None else []) + encoded["input_ids"]
        ends = [end for _, end in encoded["offset_mapping"]]
        first = len(ids) - len(ends) + next((i for i, end in enumerate(ends) if end > boundary), len(ends))
        if first == 0 and ids:
            raise UserError(f"judge {self.name} has no start token, so it cannot read a text without a prompt; set "
                            f"evaluation.prompt_length higher")
        limit = max_length(self.model)
        if limit is not None and len(ids) > limit:
            raise UserError(f"judge {self.name} reads at most {limit} tokens, but a text has {len(ids)}; set "
                            f"evaluation.sample_length lower")
        return ids, first
