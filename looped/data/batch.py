"""The question of a training step, as tensors: rows of tokens, the token sought at each row, and who may see whom."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from looped.data.task import BLANK, Problem, Task, next_token


@dataclass(frozen=True)
class Batch:
    """inputs, targets: tokens (B, L); inputs may be numbers, as images (B, C, H, W), that a model makes L rows of.
    scored: the rows that are sought (None: all). lengths: how many rows of each sequence are real (None: all); the
    others follow them. positions: where the rows stand (B, L, A), where that is not one after another. causal: a row
    sees the rows up to itself; otherwise every real row, or with a `window` those that stand at most so far away on
    every axis. documents: the number of the document that a row belongs to (B, L); a row sees those of its own
    alone."""

    inputs: Int[Tensor, "batch length"] | Float[Tensor, "batch *given"]
    targets: Int[Tensor, "batch length"]
    scored: Bool[Tensor, "batch length"] | None = None
    lengths: Int[Tensor, "batch"] | None = None
    positions: Int[Tensor, "batch length axes"] | None = None
    causal: bool = True
    window: int | None = None
    documents: Int[Tensor, "batch length"] | None = None

    @staticmethod
    def of(tokens: "Int[Tensor, 'batch length_and_one'] | Batch") -> "Batch":
        """A batch as it is; of plain tokens, the task to predict each from those before it."""
        return tokens if isinstance(tokens, Batch) else Batch(tokens[:, :-1], tokens[:, 1:])

    @staticmethod
    def of_documents(tokens: Int[Tensor, "batch length_and_one"], end_of_text: int) -> "Batch":
        """The same within each document: the row of an end of text begins the next one, whose first token is predicted
        from it alone, at position 0; so every target belongs to the document of its row."""
        batch = Batch.of(tokens)
        begins = batch.inputs == end_of_text
        place = torch.arange(batch.inputs.shape[1], device=tokens.device)
        first = torch.where(begins, place, 0).cummax(1).values
        return replace(batch, documents=begins.cumsum(1), positions=(place - first).unsqueeze(-1))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: slice | Int[Tensor, "rows"]) -> "Batch":
        """Some of the sequences."""
        return self._map(lambda value: value[rows])

    def to(self, device: torch.device | str) -> "Batch":
        return self._map(lambda value: value.to(device))

    def repeat(self, times: int) -> "Batch":
        """All sequences, so many times over."""
        return self._map(lambda value: value.repeat(times, *[1] * (value.ndim - 1)))

    def _map(self, change) -> "Batch":
        return replace(self, **{name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)})

    @property
    def sought(self) -> Bool[Tensor, "batch length"]:
        """The rows that are sought, as a tensor in any case."""
        return torch.ones_like(self.targets, dtype=torch.bool) if self.scored is None else self.scored

    @property
    def num_rows(self) -> int:
        """Rows of a sequence, also those that fill it up."""
        return self.targets.shape[1]

    @property
    def num_tokens(self) -> int:
        """Rows that are real."""
        return self.targets.numel() if self.lengths is None else int(self.lengths.sum())

    def mean(self, losses: Float[Tensor, "batch length"]) -> Float[Tensor, "batch"]:
        """The mean of each sequence over the rows that are sought."""
        if self.scored is None:
            return losses.mean(1)
        return (losses * self.scored).sum(1) / self.scored.sum(1).clamp(min=1)


def collate(task: Task, problems: Sequence[Problem], *, causal: bool, window: int | None = None) -> Batch:
    """Problems of any lengths as one batch, the shorter ones filled up with cells that nobody sees."""
    if causal and task.causal == "next-token":
        problems = [next_token(problem) for problem in problems]
    lengths = [len(problem) for problem in problems]
    even = min(lengths) == max(lengths)
    return Batch(_stack([problem.inputs for problem in problems], lengths),
                 _stack([problem.targets for problem in problems], lengths),
                 _stack([problem.scored for problem in problems], lengths),
                 None if even else torch.tensor(lengths),
                 None if causal else _stack([task.coordinates(length) for length in lengths], lengths),
                 causal, window)


def _stack(rows: Sequence[np.ndarray], lengths: Sequence[int]) -> Tensor:
    filled = np.full((len(rows), max(lengths), *rows[0].shape[1:]), BLANK, dtype=rows[0].dtype)
    for place, row in enumerate(rows):
        filled[place, : len(row)] = row
    return torch.from_numpy(filled)
