"""A batch of a training step as tensors: inputs, targets, loss mask, positions and attention pattern."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from looped.data.task import BLANK, Problem, Task, next_token
from looped.tensor_types import Bool, Float, Int


@dataclass(frozen=True)
class Batch:
    """B sequences of L rows (positions) with their targets and attention pattern.

    inputs, targets: tokens (B, L); inputs may be images (B, C, H, W), which the model turns into L rows. scored: mask
    of the rows in the loss (None: all). lengths: number of real rows per sequence (None: all); padding follows them.
    positions: coordinates of the rows (B, L, A), if they are not consecutive. causal: a row attends to the rows up to
    itself; otherwise to every real row, or with a `window` to those at most that far away on every axis. documents:
    index of each row's document (B, L); a row attends only within its document."""

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
        """Tokens as a batch for next-token prediction; a batch is returned unchanged."""
        return tokens if isinstance(tokens, Batch) else Batch(tokens[:, :-1], tokens[:, 1:])

    @staticmethod
    def of_documents(tokens: Int[Tensor, "batch length_and_one"], end_of_text: int) -> "Batch":
        """Next-token prediction within each document. The row of an end-of-text token starts the next document, at
        position 0: from it alone the document's first token is predicted. So a target belongs to its row's document."""
        batch = Batch.of(tokens)
        begins = batch.inputs == end_of_text
        place = torch.arange(batch.inputs.shape[1], device=tokens.device)
        first = torch.where(begins, place, 0).cummax(1).values
        return replace(batch, documents=begins.cumsum(1), positions=(place - first).unsqueeze(-1))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: slice | Int[Tensor, "rows"]) -> "Batch":
        """A subset of the sequences."""
        return self._map(lambda value: value[rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The batch on a device; `non_blocking` as in `Tensor.to`."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def repeat(self, times: int) -> "Batch":
        """The batch concatenated `times` times."""
        return self._map(lambda value: value.repeat(times, *[1] * (value.ndim - 1)))

    def _map(self, change) -> "Batch":
        return replace(self, **{name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)})

    @property
    def sought(self) -> Bool[Tensor, "batch length"]:
        """Mask of the rows in the loss, a tensor even if `scored` is None."""
        return torch.ones_like(self.targets, dtype=torch.bool) if self.scored is None else self.scored

    @property
    def num_rows(self) -> int:
        """Rows per sequence, padding included."""
        return self.targets.shape[1]

    @property
    def num_tokens(self) -> int:
        """Real rows of all sequences, without padding."""
        return self.targets.numel() if self.lengths is None else int(self.lengths.sum())

    def mean(self, losses: Float[Tensor, "batch length"]) -> Float[Tensor, "batch"]:
        """Mean loss of each sequence over its scored rows."""
        if self.scored is None:
            return losses.mean(1)
        return (losses * self.scored).sum(1) / self.scored.sum(1).clamp(min=1)


def collate(task: Task, problems: Sequence[Problem], *, causal: bool, window: int | None = None) -> Batch:
    """Problems of any lengths as one batch; shorter ones are padded with cells that no row attends to."""
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
