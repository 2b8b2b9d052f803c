"""Induction in p hops: where this letter stood before, what came after it, and so on from there."""

from string import ascii_lowercase

import numpy as np

from looped.data.task import Problem, Task, blanks, register
from looped.errors import UserError

HOP, FIRST_LETTER = 1, 2  # tokens


@register
class PHop(Task):
    """p marks `>`, a row v_1 ... v_n of letters, and one answer cell: the letter p hops back from the last one.

        find_1(i) = max({0} u {j <= i: v_{j-1} = v_i})        the place after the last earlier v_i
        find_p(i) = find_1(find_{p-1}(i))
        answer    = v_{find_p(n)}

    As in the first paper, rows are uniform among those without equal neighbours. A hop then goes back by k - 1 places
    on average (k letters), and a row on which the chain ends before p hops (find = 0) is drawn anew. The rule
    n >= k p leaves the chain room for k places a hop, so that most rows pass: nine in ten of the hardest by default.

    The first paper writes p as one symbol, and has so many symbols as it trains hops. Here p is written in marks, so
    that more hops than were ever trained can be asked for with what is known; they come first, where the paper has its
    symbol, so that also a causal model reads every letter knowing p.

    alphabet: number of letters k, 3 to 26 (with two, rows without equal neighbours leave nothing to find). length: of
    the row, n; 256 in the second paper, and here 64, which a CPU can train.
    """

    name = "p-hop"
    source = "Sanford et al. 2024, arXiv 2402.09268, section 4; Saunshi et al. 2025, arXiv 2502.17416, definition A.1"
    difficulty = "hops"
    trained = (1, 4)
    causal = "next-token"

    def __init__(self, *, alphabet: int = 4, length: int = 64) -> None:
        if not (isinstance(alphabet, int) and 3 <= alphabet <= len(ascii_lowercase)):
            raise UserError(f"task.options.alphabet {alphabet!r} is not a number of letters from 3 to 26")
        least = alphabet * self.trained[1]
        if not (isinstance(length, int) and length >= least):
            raise UserError(f"task.options.length {length!r} is too short for {self.trained[1]} hops among "
                            f"{alphabet} letters; make it {least} or more")
        self.alphabet, self.length = alphabet, length
        self.symbols = (".", ">", *ascii_lowercase[:alphabet])
        self.tested = tuple(hops for hops in (4, 8, 16, 32, 64) if alphabet * hops <= length)

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        if self.alphabet * difficulty > self.length:
            raise UserError(f"task.options.length {self.length} is too short for {difficulty} hops among "
                            f"{self.alphabet} letters; make it {self.alphabet * difficulty} or more")
        while True:
            letters = self._letters(rng)
            place = follow(letters, difficulty)
            if place is not None:
                marks = [HOP] * difficulty
                return blanks([*marks, *(FIRST_LETTER + letters)], [FIRST_LETTER + letters[place]])

    def _letters(self, rng: np.random.Generator) -> np.ndarray:
        """Uniform letters, no two neighbours equal: each is 1 to k - 1 further round the alphabet than the last."""
        steps = rng.integers(1, self.alphabet, self.length)
        steps[0] = rng.integers(0, self.alphabet)
        return np.cumsum(steps) % self.alphabet


def follow(letters: np.ndarray, hops: int) -> int | None:
    """The place (from 0) that so many hops lead to from the last letter; None where they end before."""
    place = len(letters) - 1
    for _ in range(hops):
        earlier = np.flatnonzero(letters[:place] == letters[place])
        if len(earlier) == 0:
            return None
        place = int(earlier[-1]) + 1
    return place
