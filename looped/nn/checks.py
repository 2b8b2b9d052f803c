"""Argument checks of public functions: whole numbers, depths, token ids, one count per sequence.

Each check raises a `UserError` that names the argument, its value and a fix. Checks that wait for the device are not
called inside a training step.
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
    """Description for error messages: a tensor by dtype and shape, anything else by its type."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return "None" if value is None else _a(type(value).__name__)


def _a(word: str) -> str:
    """The word with its indefinite article."""
    return f"{'an' if word[0] in 'AEIOUaeiou' else 'a'} {word}"


def whole_number(name: str, value: Any, least: int = 0) -> int:
    """The value as an int. Raises UserError unless it is a whole number of `least` or more."""
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be a whole number of {least} or more, got {value!r}") from None
    if number < least:
        raise UserError(f"{name} {number} is below {least}; give a whole number of {least} or more")
    return number


def depths_of(depths: Any, least: int = 1) -> list[int]:
    """Evaluation depths, sorted, without duplicates. Raises UserError if there are none or one is invalid."""
    if isinstance(depths, str) or not isinstance(depths, Iterable):
        raise UserError(f"depths must be a sequence of whole numbers, such as [1, 2, 4], got {depths!r}")
    found = sorted({whole_number("a depth", depth, least) for depth in depths})
    if not found:
        raise UserError("depths is empty; give at least one, such as [1, 2, 4]")
    return found


def one_for_all(name: str, count: int | Tensor) -> int | Tensor:
    """The count as an int if it is a tensor without axes; one per sequence unchanged."""
    return whole_number(name, count) if isinstance(count, Tensor) and not count.ndim else count


def counts_by_row(name: str, counts: int | Tensor, batch: int) -> list[int]:
    """One count per sequence of a batch, from one for all or a tensor (batch,) of whole numbers."""
    if not isinstance(counts, Tensor):
        return [whole_number(name, counts)] * batch
    if counts.dtype not in WHOLE or counts.shape not in ((), (1,), (batch,)):
        raise UserError(f"{name} must be one whole number or a tensor of {batch} of them, one for each sequence, got "
                        f"{kind_of(counts)}")
    found = counts.expand(batch).tolist()
    whole_number(f"the least {name}", min(found, default=0))
    return found


def require(value: Any, kind: type, name: str, way_out: str) -> None:
    """Raise UserError if an argument has the wrong type: a dict for a config, a model for its training rule."""
    if not isinstance(value, kind):
        raise UserError(f"{name} must be {_a(kind.__name__)}, got {kind_of(value)}; {way_out}")


def ids_of(tokens: Any, vocab_size: int, *, least_length: int = 1) -> Tensor:
    """A batch of token ids below `vocab_size` as int64. Raises UserError for anything else; reading the ids waits for
    the device."""
    shape = f"(batch, {least_length} or more)"
    if not isinstance(tokens, Tensor) or tokens.dtype not in IDS:
        raise UserError(f"tokens must be a tensor {shape} of int64 or int32 token ids, got {kind_of(tokens)}")
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < least_length:
        raise UserError(f"tokens must have the shape {shape}, got {tuple(tokens.shape)}"
                        + ("; for one sequence pass tokens.unsqueeze(0)" if tokens.ndim == 1 else ""))
    if not torch.compiler.is_compiling() and (bad := tokens[(tokens < 0) | (tokens >= vocab_size)]).numel():
        raise UserError(f"token id {bad[0].item()} is outside the vocabulary, 0 ... {vocab_size - 1}; encode the "
                        f"text with the run's own tokenizer, and remove padding or labels such as -100")
    return tokens.long()
