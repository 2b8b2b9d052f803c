"""Tests of a custom core: of the rows that it must not read, and of those that it must read from a cache.

No row of its output may depend on a row that the attention mask hides from it. A row may change the rows that attend to
it, those that attend to these, and so on, since a core may have several layers. Every other row of the output must stay
as it is, up to rounding. Under full attention nothing is hidden.

Generation gives the core the new rows alone, and what it keeps of the earlier ones in a cache: a text in pieces must
come out as in one.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from looped.errors import UserError
from looped.nn.blocks import unchanged
from looped.nn.cache import Cache
from looped.nn.fused import compute_dtype
from looped.nn.mask_base import Mask
from looped.nn.rows import Rows
from looped.objectives.base import Objective, evaluating
from looped.rng import generator
from looped.tensor_types import Bool

CHUNK = 512
"""Keys whose queries are looked up at once, so that the memory does not grow with the square of the length."""


PIECES = ((0, 3), (3, 4), (4, 6))
"""Rows of the text that is processed in pieces: generation goes on by one row or several."""


class CacheUnread(UserError):
    """The error for a custom core that cannot write text, since it mixes rows and does not find the earlier ones."""


class _FirstStep(Exception):
    """Ends the run of a model at its first loop step, whose arguments it holds."""


@torch.no_grad()
def check_core(objective: Objective, run: Callable[[], Any]) -> None:
    """Raise UserError if a custom block of the model's core lets through what the attention mask hides.

    run: runs the model on a few sequences, as the caller will; it is ended at the first loop step, which gives the
    mask, positions and noise levels to test with. A model of the package's own layers is not run.
    """
    blocks = [block for _, block in _custom_blocks(objective.model)]
    call = _first_step(objective.model.recurrence, run) if blocks else None
    if call is None:
        return
    state, e, cond, rows = call
    if rows is None or rows.mask is None or rows.context is not None:
        return
    for block in blocks:
        training = block.training
        block.eval()
        try:
            _check_block(block, state, e, cond, rows)
        finally:
            block.train(training)


@torch.no_grad()
def check_cached(objective: Objective, *, otherwise: str = "") -> None:
    """Raise CacheUnread if a step with a custom block gives other rows for a text in cached pieces than for the whole.

    otherwise: another way out than the cache. Only a model that says that it caches its steps (`LanguageModel`) is run,
    and only for blocks that are not of the package: what a custom model keeps in a cache is its own affair.
    """
    model = objective.model
    for number, block in _custom_blocks(model) if getattr(model, "caches_steps", False) else ():
        with evaluating(objective):
            apart = _distance_in_pieces(model, number if model.recurrence.num_blocks > 1 else None)
        if apart > 1:
            raise CacheUnread(f"{_own_name(block)} mixes rows but does not find the earlier ones in rows.cache, so "
                              f"that generation, which gives it the new rows alone, would write another text than the "
                              f"whole one implies; keep keys and values there, k, v = "
                              f"rows.cache.layer(0).append(k, v), as in docs/modules.md{otherwise}")


def _distance_in_pieces(model: Any, block: int | None) -> float:
    """Largest change of a step's rows if they come in pieces, relative to what rounding may account for."""
    device, length = model.embed.weight.device, PIECES[-1][1]
    e = model.encode(torch.arange(length, device=device).unsqueeze(0) % model.vocab_size)
    drawn = torch.randn(e.shape, generator=generator("own block")).to(e)
    state = model.initial_state(e, drawn if model.recurrence.needs_noise else None)
    state = state + torch.randn(state.shape, generator=generator("own state")).to(state)
    level = None if model.level_embedding is None else torch.zeros(1, device=device)
    plain, cache = Rows(block=block, step=1), Cache()
    whole = model.step(state, e, level, plain)
    pieces = torch.cat([model.step(state[:, first:stop], e[:, first:stop], level,
                                   plain.having(start=first, cache=cache)) for first, stop in PIECES], dim=1)
    eps = torch.finfo(compute_dtype(e)).eps
    rounding = max(eps, 2**-10 if e.is_cuda else 0) ** 0.5  # TF32 rounds to ten bits
    return ((whole - pieces).abs().max() / (rounding * whole.abs().max())).item()


def in_two_documents(objective: Objective, tokens: Any) -> Any:
    """Sequences of tokens in which, if documents are separate, one ends in the middle; anything else unchanged."""
    if not objective.separate or not isinstance(tokens, Tensor):
        return tokens
    tokens = tokens.clone()
    tokens[:, tokens.shape[1] // 2] = objective.end_of_text
    return tokens


def _custom_blocks(model: Any) -> Iterator[tuple[int, nn.Module]]:
    """(number, block) of the blocks that are not of the package."""
    core = getattr(getattr(model, "recurrence", None), "core", None)
    for number, block in enumerate(getattr(core, "blocks", [core])):
        if block is not None and not getattr(block, "keeps_mask", False):
            yield number, block


def _first_step(recurrence: nn.Module, run: Callable[[], Any]) -> tuple[Tensor, Tensor, Tensor | None, Any] | None:
    """(state, e, cond, rows) of the first loop step of a run; None if it takes no step."""
    def apply_core(state, e, cond, rows, block):
        raise _FirstStep(state, e, cond, rows)

    recurrence.apply_core = apply_core
    try:
        run()
    except _FirstStep as first:
        return first.args
    finally:
        del recurrence.apply_core
    return None


def _check_block(block: nn.Module, state: Tensor, e: Tensor, cond: Tensor | None, rows: Rows) -> None:
    batch, length = state.shape[:2]
    before = block(state, e, cond, rows)
    for row in sorted({0, length // 4, length // 2, 3 * length // 4, length - 1}):
        hidden = ~reached(rows.mask, row, batch, length, state.device)
        if not hidden.any():
            continue
        after = block(_changed(state, row), _changed(e, row), cond, rows)
        moved = hidden & ~unchanged(before, after).all(-1)
        if moved.any():
            raise UserError(f"{_own_name(block)} lets row {row} change row "
                            f"{int(moved.any(0).nonzero()[0])}, from which the attention mask "
                            f"({type(rows.mask).__name__}) hides it, so it would read the tokens that it is to "
                            f"predict; apply rows.mask wherever rows are mixed")


def _own_name(block: nn.Module) -> str:
    """The name of the custom class within a block."""
    for wrapped in ("net", "block"):
        block = getattr(block, wrapped, block)
    return type(block).__name__


def reached(mask: Mask, row: int, batch: int, length: int,
            device: torch.device | str = "cpu") -> Bool[Tensor, "batch length"]:
    """The rows that a row can change: itself, those that may attend to it, those that may attend to these, ..."""
    place, b = torch.arange(length, device=device), torch.arange(mask.batch or batch, device=device)
    seen = (place == row).repeat(batch, 1)
    new = seen
    while new.any():
        found = torch.zeros_like(seen)
        for keys in new.any(0).nonzero().squeeze(1).split(CHUNK):
            attends = mask.ask(place.view(1, 1, -1, 1), keys.view(1, 1, 1, -1), b.view(-1, 1, 1, 1)).squeeze(1)
            found |= (attends & new[:, None, keys]).any(-1)  # B L keys
        new, seen = found & ~seen, seen | found
    return seen


def _changed(x: Tensor, row: int) -> Tensor:
    """The rows with one of them moved by standard normal draws."""
    moved = x.clone()
    moved[:, row] += torch.randn(x.shape[2:], generator=generator("own block")).to(x)
    return moved
