"""Left padding of prompts of unequal length in one batch: positions, masks and random draws of each row."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from looped.errors import UserError
from looped.nn.cache import Cache
from looped.nn.mask_base import Mask
from looped.nn.masks import Padded
from looped.rng import StepRandom
from looped.shapes import Float, Int

Draws = Callable[[int], StepRandom]
"""Step or position -> its random draws."""


class Padding:
    """Empty columns on the left of the shorter rows of a batch."""

    def __init__(self, lengths: Int[Tensor, "batch"] | None, width: int):
        self.lengths: Tensor | None = None if lengths is None or bool((lengths == width).all()) else lengths
        if lengths is not None and not 0 <= int(lengths.min()) <= int(lengths.max()) <= width:
            raise UserError(f"prompt lengths {lengths.tolist()} do not lie between 0 and the padded length {width}; "
                            f"give the number of real tokens of each row")
        self.shortest: int = width if lengths is None else int(lengths.min())
        self.empty: Tensor | None = None if self.lengths is None else width - self.lengths

    def on_the_left(self, tokens: Int[Tensor, "batch length"], side: str) -> Int[Tensor, "batch length"]:
        """The tokens with the padding of `side` moved to the left."""
        if side not in ("left", "right"):
            raise UserError(f"padding side '{side}' is unknown; use 'right' or 'left'")
        if self.empty is None or side == "left":
            return tokens
        columns = torch.arange(tokens.shape[1], device=tokens.device) - self.empty.unsqueeze(1)
        return tokens.gather(1, columns % tokens.shape[1])

    def start(self, column: int) -> int | Int[Tensor, "batch"]:
        """The position of a column in each row."""
        return column if self.empty is None else column - self.empty

    def mask(self, width: int, *, causal: bool = True) -> Mask | None:
        """Attention mask of the first `width` columns; None if no column is empty."""
        return None if self.empty is None else Padded(width - self.empty, side="left", causal=causal, width=width)

    def normal_by_place(self, draws: Draws, stream: str, first: int, stop: int,
                        dim: int) -> Float[Tensor, "batch columns dim"]:
        """Standard normal draws for the columns first ... stop - 1, by each row's own position, so they do not depend
        on how much of a text is processed at once; empty columns get zeros."""
        low = first if self.empty is None else max(0, first - int(self.empty.max()))
        drawn = torch.stack([draws(place).normal(stream, (dim,)) for place in range(low, stop)], dim=1)
        if self.empty is None:
            return drawn
        places = torch.arange(first, stop, device=drawn.device) - self.empty.to(drawn.device).unsqueeze(1)
        own = drawn.gather(1, (places - low).clamp(min=0).unsqueeze(-1).expand(-1, -1, dim))
        return own * (places >= 0).unsqueeze(-1)

    def normal(self, random: StepRandom, stream: str, first: int, stop: int, dim: int) -> Tensor:
        """Standard normal draws for the columns first ... stop - 1, as without padding; empty columns get zeros."""
        if self.empty is None or first > 0:
            return random.normal(stream, (stop - first, dim))
        rows = [torch.randn(stop - empty, dim, generator=gen)
                for empty, gen in zip(self.empty.tolist(), random.per_row(stream), strict=True)]
        padded = [torch.nn.functional.pad(row, (0, 0, stop - len(row), 0)) for row in rows]
        return torch.stack(padded).to(random.device)


@dataclass(frozen=True)
class Reading:
    """A piece of text to process: `tokens` (B, n) at the columns from `first` on, with `depth` steps. cache: keys and
    values of the columns before, to which those of the new ones are added; None: no cache is used."""

    tokens: Int[Tensor, "batch new"]
    depth: int
    padding: Padding
    first: int = 0
    cache: Cache | None = None

    def places(self) -> Int[Tensor, "#batch new"]:
        """The positions of the columns in each row; negative for empty columns."""
        start = torch.as_tensor(self.padding.start(self.first), device=self.tokens.device).reshape(-1, 1)
        return start + torch.arange(self.tokens.shape[1], device=self.tokens.device)
