"""Checks that public functions make of their arguments before they start: whole numbers, depths, ids, one level a row.

Each check raises `UserError`, names the argument and what it got, and says what would do. None of them is called inside
a training step where it would have to wait for the device.
"""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from looped.errors import UserError

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
IDS = (torch.int64, torch.int32)
"""The dtypes that an embedding takes."""


def kind_of(value: Any) -> str:
    """A tensor by dtype and shape, anything else by its type, for a sentence."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return "None" if value is None else _a(type(value).__name__)


def _a(word: str) -> str:
    """The word after its article."""
    return f"{'an' if word[0] in 'AEIOUaeiou' else 'a'} {word}"


def whole_number(name: str, value: Any, least: int = 0) -> int:
    """The number itself. Raises UserError for what is no whole number, and for one below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be a whole number of {least} or more, got {value!r}") from None
    if number < least:
        raise UserError(f"{name} {number} is below {least}; give a whole number of {least} or more")
    return number


def depths_of(depths: Any, least: int = 1) -> list[int]:
    """Depths to evaluate at, ascending and each once. Raises UserError where there is none, or one is no depth."""
    if isinstance(depths, str) or not isinstance(depths, Iterable):
        raise UserError(f"depths must be a sequence of whole numbers, such as [1, 2, 4], got {depths!r}")
    found = sorted({whole_number("a depth", depth, least) for depth in depths})
    if not found:
        raise UserError("depths is empty; give at least one, such as [1, 2, 4]")
    return found


def counts_by_row(name: str, counts: int | Tensor, batch: int) -> list[int]:
    """A count for each row of a batch, from one for all or a tensor (batch,) of whole numbers."""
    if not isinstance(counts, Tensor):
        return [whole_number(name, counts)] * batch
    if counts.dtype not in WHOLE or counts.shape not in ((), (1,), (batch,)):
        raise UserError(f"{name} must be one whole number or a tensor of {batch} of them, one for each sequence, got "
                        f"{kind_of(counts)}")
    found = counts.expand(batch).tolist()
    whole_number(f"the least {name}", min(found, default=0))
    return found


def require(value: Any, kind: type, name: str, way_out: str) -> None:
    """Raise UserError where an argument is of another kind: a dict for a config, a model for its training rule."""
    if not isinstance(value, kind):
        raise UserError(f"{name} must be {_a(kind.__name__)}, got {kind_of(value)}; {way_out}")


def ids_of(tokens: Any, vocab_size: int, *, least_length: int = 1) -> Tensor:
    """A batch of token ids below `vocab_size` as int64. Raises UserError for anything else; it looks at the ids, which
    waits for the device."""
    shape = f"(batch, {least_length} or more)"
    if not isinstance(tokens, Tensor) or tokens.dtype not in IDS:
        raise UserError(f"tokens must be a tensor {shape} of int64 or int32 token ids, got {kind_of(tokens)}")
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < least_length:
        raise UserError(f"tokens must have the shape {shape}, got {tuple(tokens.shape)}"
                        + ("; of one sequence make tokens.unsqueeze(0)" if tokens.ndim == 1 else ""))
    if not torch.compiler.is_compiling() and (bad := tokens[(tokens < 0) | (tokens >= vocab_size)]).numel():
        raise UserError(f"token id {bad[0].item()} is not one of the vocabulary, 0 ... {vocab_size - 1}; encode the "
                        f"text with the run's own tokenizer, and cut padding or labels such as -100")
    return tokens.long()
