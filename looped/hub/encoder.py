"""A transformers model as text encoder: its last hidden state at the last token.

These are the features of MAUVE's authors (Pillutla et al. 2021, arXiv 2102.01454, section 4).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from looped.hub.loading import batches, load, max_length
from looped.tensor_types import Float

BATCH = 16
MAX_TOKENS = 1024
"""Longer texts are truncated, as in the authors' code."""


class HubEncoder:
    """A text encoder by name. Raises `UserError` for models that `load` refuses."""

    def __init__(self, name: str, *, device: str | torch.device = "cpu"):
        self.name = name
        self.model: Any
        self.tokenizer: Any
        self.model, self.tokenizer = load(name, "AutoModel")
        self.model.to(device)

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> Float[Tensor, "num width"]:
        """The hidden state of the last layer at each text's last token."""
        limit = min(MAX_TOKENS, max_length(self.model) or MAX_TOKENS)
        rows = self.tokenizer(list(texts), truncation=True, max_length=limit, verbose=False)["input_ids"]
        rows = [row or [0] for row in rows]  # an empty text
        found = []
        for ids, mask in batches(self.tokenizer, rows, BATCH):
            hidden = self.model(ids.to(self.model.device), attention_mask=mask.to(self.model.device)).last_hidden_state
            found.append(hidden[torch.arange(len(ids)), mask.sum(1) - 1].float().cpu())
        return torch.cat(found)
