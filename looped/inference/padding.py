"""Left padding of prompts of unequal length in one batch: positions, masks and random draws of each row."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from looped.devices import to_device
from looped.errors import UserError
from looped.nn.cache import Cache
from looped.nn.mask_base import Mask
from looped.nn.masks import Causal, Padded
from looped.nn.rows import Rotary, Rotation, Rows
from looped.rng import StepRandom
from looped.tensor_types import Float, Int

Draws = Callable[[int], StepRandom]
"""Step or position -> its random draws."""


class Padding:
    """Empty columns on the left of the shorter rows of a batch. What all calls of a growing text have in common is made
    once: masks for each width, and rotary angles for twice the columns that are needed."""

    def __init__(self, lengths: Int[Tensor, "batch"] | None, width: int, device: torch.device | str | None = None):
        """device: of the tokens; None: that of `lengths`, which are read if it is not the CPU."""
        numbers = [width] if lengths is None else lengths.tolist()
        if lengths is not None and not 0 <= min(numbers) <= max(numbers) <= width:
            raise UserError(f"prompt lengths {numbers} do not lie between 0 and the padded length {width}; "
                            f"give the number of real tokens of each row")
        even = all(number == width for number in numbers)
        self.shortest: int = min(numbers)
        self.num_empty: Tensor | None = None if even else width - torch.tensor(numbers)
        """`empty` on the host."""
        self.empty: Tensor | None = None if even else to_device(self.num_empty, device or lengths.device)
        self._masks: dict[tuple[int, bool], Mask] = {}
        self._angles = Angles(self)

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

    def rows(self, first: int, *, mask: Mask | None = None, cache: Cache | None = None,
             context: Cache | None = None) -> Rows:
        """The columns from `first` on, as model calls need them."""
        return Rows(mask=mask, start=self.start(first), cache=cache, context=context,
                    angles=partial(self._angles.of, first))

    def mask(self, width: int, *, causal: bool = True) -> Mask | None:
        """Attention mask of the first `width` columns; None if no column is empty."""
        return None if self.num_empty is None else self._made(width, causal)

    def causal(self, width: int) -> Mask:
        """`mask`, or the causal one if no column is empty: one object, whose form for a backend is built once."""
        return self._made(width, True)

    def _made(self, width: int, causal: bool) -> Mask:
        """The mask of a width, from the last two made: a text only grows."""
        if (width, causal) not in self._masks:
            mask: Mask = Causal()
            if self.num_empty is not None:
                mask = Padded(width - self.num_empty, side="left", causal=causal, width=width)
            self._masks = dict(list(self._masks.items())[-1:]) | {(width, causal): mask}
        return self._masks[width, causal]

    def normal_by_place(self, draws: Draws, stream: str, first: int, stop: int,
                        dim: int) -> Float[Tensor, "batch columns dim"]:
        """Standard normal draws for the columns first ... stop - 1, by each row's own position, so they do not depend
        on how much of a text is processed at once; empty columns get zeros."""
        low = first if self.num_empty is None else max(0, first - int(self.num_empty.max()))
        places = [draws(place) for place in range(low, stop)]
        drawn = torch.stack([each.drawn(stream, (dim,)) for each in places], dim=1)
        if self.num_empty is not None:
            columns = torch.arange(first, stop) - self.num_empty.unsqueeze(1)
            own = drawn.gather(1, (columns - low).clamp(min=0).unsqueeze(-1).expand(-1, -1, dim))
            drawn = own * (columns >= 0).unsqueeze(-1)
        return to_device(drawn, places[0].device)

    def normal(self, random: StepRandom, stream: str, first: int, stop: int, dim: int) -> Tensor:
        """Standard normal draws for the columns first ... stop - 1, as without padding; empty columns get zeros."""
        if self.num_empty is None or first > 0:
            return random.normal(stream, (stop - first, dim))
        rows = [torch.randn(stop - empty, dim, generator=gen)
                for empty, gen in zip(self.num_empty.tolist(), random.per_row(stream), strict=True)]
        padded = [torch.nn.functional.pad(row, (0, 0, stop - len(row), 0)) for row in rows]
        return to_device(torch.stack(padded), random.device)


class Angles:
    """Rotary angles of the columns of a growing text, computed for twice the columns that are needed."""

    def __init__(self, padding: Padding):
        self.padding = padding
        self.rotary: Rotary | None = None
        self.columns: range = range(0)
        self.table: Rotation | None = None

    def of(self, first: int, rotary: Rotary, x: Float[Tensor, "batch new width"]) -> Rotation:
        """The angles of the rows x, the columns from `first` on."""
        stop = first + x.shape[1]
        if rotary is not self.rotary or first < self.columns.start or stop > self.columns.stop:
            self.rotary, start = rotary, min(first, self.columns.start) if self.columns else first
            self.columns = range(start, 2 * stop - start)
            ahead = Rows(start=self.padding.start(start))
            self.table = rotary(ahead.consecutive(len(self.columns), x.device))
        cos, sin = self.table
        own = slice(first - self.columns.start, stop - self.columns.start)
        return cos[:, own], sin[:, own]


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
        places = Rows(start=self.padding.start(self.first)).consecutive(self.tokens.shape[1], self.tokens.device)
        return places.reshape(-1, self.tokens.shape[1])
