"""Time of the order of a mixture per step, and the distance of its counts from the weights.

Three sources of 10^9 windows each, of which no token is stored; 32 and 1,024 rows of steps far apart, medians of 200.
"""

import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from looped.data.mixed_stream import MixedStream
from looped.data.quotas import Quotas
from looped.data.token_windows import TokenStream, items_of

WINDOWS, LENGTH, STEPS = 10**9, 1024, 200
TOKENS = np.broadcast_to(np.uint16(1), WINDOWS * LENGTH + 1)
SHARES = (("0.5", "0.3", "0.2"), ("0.9", "0.09", "0.01"), ("0.9", "0.0999", "0.0001"))


def stream() -> TokenStream:
    return TokenStream("train", TOKENS, end_of_text=0)


def milliseconds(draw: Callable[[int], Any]) -> str:
    """The median time of `draw(step)` over steps far apart."""
    taken = []
    for step in range(STEPS):
        begun = time.perf_counter()
        draw(step * 10**6)
        taken.append(time.perf_counter() - begun)
    return f"{1000 * median(taken):.2f}"


def alone(rows: int, step: int) -> None:
    stream().starts(items_of(step, rows), LENGTH, seed=0)


def mixed(train: MixedStream, rows: int, step: int) -> None:
    train.drawn(items_of(step, rows), LENGTH, 0)


def with_tokens(train: TokenStream | MixedStream, rows: int, step: int) -> None:
    train.batch(step, batch_size=rows, length=LENGTH, seed=0)


def distances(shares: list[Fraction]) -> tuple[float, float]:
    """The greatest |n_i - n w_i| after a period, and after any sequence, over 64 periods."""
    quotas = Quotas(shares)
    numbers = np.arange(64 * quotas.period)
    sources, _ = quotas.turns(numbers, 0)
    off = np.stack([np.abs(np.cumsum(sources == source) - (numbers + 1) * float(share))
                    for source, share in enumerate(shares)])
    return off[:, quotas.period - 1 :: quotas.period].max(), off.max()


def main() -> None:
    print("| shares | period | off after a period | off anywhere | rows | order: one source, ms | mixture, ms "
          "| with tokens: one source, ms | mixture, ms |")
    print("|---|" + "---:|" * 8)
    for texts in SHARES:
        shares = [Fraction(text) for text in texts]
        names = dict(zip("abc", shares, strict=True))
        train = MixedStream("train", {name: stream() for name in names}, names)
        ends, anywhere = distances(shares)
        for rows in (32, 1024):
            figures = [milliseconds(draw) for draw in (
                partial(alone, rows), partial(mixed, train, rows), partial(with_tokens, stream(), rows),
                partial(with_tokens, train, rows))]
            print(f"| {', '.join(texts)} | {train.quotas.period:,} | {ends:.3f} | {anywhere:.1f} | {rows:,} | "
                  + " | ".join(figures) + " |")


if __name__ == "__main__":
    main()
