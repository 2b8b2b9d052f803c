"""Caches for transformers' `generate` with a free number of steps: a growing one for loops, and one for denoisers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache as Kept
from transformers.cache_utils import DynamicCache, DynamicLayer

from looped.errors import UserError
from looped.hub.logits_api import LoopReader, Manner, Reader, SolverReader
from looped.inference.padding import Draws, Reading
from looped.inference.text_denoising import DenoiseWriter
from looped.nn.cache import Cache, LayerCache, Path


class Slot(LayerCache):
    """A layer of a transformers cache, stored as (B, G, M, K), with the interface of ours, (B, M, G, K)."""

    def __init__(self, kept: Kept, index: int):
        self.kept = kept
        self.index = index

    @property
    def length(self) -> int:
        return self.kept.layers[self.index].get_seq_length()

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows at the end and return all of them."""
        k, v = self.kept.update(k.transpose(1, 2), v.transpose(1, 2), self.index)
        return k.transpose(1, 2), v.transpose(1, 2)


def _check_depth(filled: int, depth: int) -> None:
    """Raises UserError for a cache that was filled at another depth: what did not run then has no keys of earlier
    tokens."""
    if filled != depth:
        raise UserError(f"this cache was filled with num_steps {filled} and is read with {depth}; give both the same, "
                        f"or start with a new cache")


def _fixed(kept: Kept) -> bool:
    """True for a cache that does not grow, such as a static or sliding one."""
    return any(type(layer) is not DynamicLayer for layer in kept.layers) or kept.is_compileable


def grown(kept: Kept, depth: int) -> Cache:
    """A loop's cache inside a transformers cache, which gets a layer when a path of the loop is first used.

    Raises UserError for a cache that cannot grow, and for one that was filled at another depth.
    """
    if _fixed(kept):
        raise UserError(f"a {type(kept).__name__} has a fixed number of layers or tokens, but a loop's cache grows "
                        f"with num_steps; leave cache_implementation out, or pass use_cache=False")
    _check_depth(kept.__dict__.setdefault("looped_depth", depth), depth)
    places: dict[Path, int] = kept.__dict__.setdefault("looped_places", {})

    def slot(path: Path) -> Slot:
        index = places.setdefault(path, len(places))
        while len(kept.layers) <= index:
            kept.layers.append(DynamicLayer())
        return Slot(kept, index)

    return Cache(slot)


NO_GUESSES = ("a denoiser's cache cannot drop tokens, so it has no speculative decoding; leave "
              "prompt_lookup_num_tokens and assistant_model out")


class SolverCache(DynamicCache):
    """The cache of a denoiser: one per noise level, held by its writer. The texts of a batch keep their order and only
    grow."""

    def __init__(self, writer: DenoiseWriter, draws: Draws):
        super().__init__()
        self.writer = writer
        self.draws = draws
        self.num_texts = 0

    @property
    def is_linear(self) -> list[bool]:
        """One layer with places, as transformers counts them: it then gives the new tokens alone."""
        return [False]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.writer.width

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise UserError("a denoiser has no beam search; leave num_beams out")

    def crop(self, max_length: int) -> None:
        raise UserError(NO_GUESSES)

    batch_repeat_interleave: Callable[..., None] = reorder_cache
    batch_select_indices: Callable[..., None] = reorder_cache


def read_loop(reader: LoopReader, reading: Reading, kept: Kept, keep: int, manner: Manner) -> tuple[Tensor, Kept]:
    """(logits of the new tokens, the cache with these tokens)."""
    own = Reading(reading.tokens, reading.depth, reading.padding, reading.first, grown(kept, reading.depth))
    return reader.logits(own, keep), kept


def read_solver(reader: SolverReader, reading: Reading, kept: Kept, keep: int, manner: Manner) -> tuple[Tensor, Kept]:
    """(logits of the next token, the cache with the tokens read); the first call creates the cache."""
    if keep > 1:
        raise UserError(NO_GUESSES)
    if not isinstance(kept, SolverCache):
        if _fixed(kept) or kept.get_seq_length():
            raise UserError(f"a denoiser makes a cache of its own, and cannot use this {type(kept).__name__}; leave "
                            f"cache_implementation and past_key_values out, or go on with the cache of its output")
        kept = SolverCache(reader.writer(reading, manner.params), reader.draws(reading, manner.seed))
    elif reading.tokens.shape[1] > 1:
        raise UserError("a denoiser goes on from its cache by one token; give new tokens one after another, or the "
                        "whole text without past_key_values")
    _check_depth(kept.writer.depth, reading.depth)
    logits = kept.writer.next_logits(reading.tokens, kept.draws(kept.num_texts))
    kept.num_texts += 1
    return logits, kept


KEEPING: dict[type[Reader], Any] = {LoopReader: read_loop, SolverReader: read_solver}
"""Class of a reader -> its cached step, (reader, reading, cache, logits to keep, manner) -> (logits, cache)."""
