"""p-hop induction: find the last earlier occurrence of a letter, take the letter after it, and repeat p times."""

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
    on average (k letters), and a row whose chain ends before p hops (find = 0) is drawn again. The condition n >= k p
    leaves k places per hop, so that most rows pass: nine in ten of the hardest by default.

    The first paper encodes p as one symbol, with one symbol per trained number of hops. Here p is a number of marks, so
    that more hops than in training need no new symbol. They come first, like the paper's symbol, so that a causal model
    also knows p when it reads the letters.

    alphabet: number of letters k, 3 to 26 (with two, a row without equal neighbours is trivial). length: of the row, n;
    256 in the second paper, and here 64, which a CPU can train. every: one answer cell per letter, as the first paper
    defines the task, `-` if the chain ends before p hops; under task.layout full each answer shares a column with its
    letter. A row then has n supervised cells instead of one.
    """

    name = "p-hop"
    source = "Sanford et al. 2024, arXiv 2402.09268, section 4; Saunshi et al. 2025, arXiv 2502.17416, definition A.1"
    difficulty = "hops"
    trained = (1, 4)
    causal = "next-token"

    def __init__(self, *, alphabet: int = 4, length: int = 64, every: bool = False) -> None:
        if not (isinstance(alphabet, int) and 3 <= alphabet <= len(ascii_lowercase)):
            raise UserError(f"task.options.alphabet {alphabet!r} is not a number of letters from 3 to 26")
        least = alphabet * self.trained[1]
        if not (isinstance(length, int) and length >= least):
            raise UserError(f"task.options.length {length!r} is too short for {self.trained[1]} hops among "
                            f"{alphabet} letters; make it {least} or more")
        if not isinstance(every, bool):
            raise UserError(f"task.options.every {every!r} is neither true (an answer for each letter) nor false")
        self.alphabet, self.length, self.every = alphabet, length, every
        self.symbols = (".", ">", *ascii_lowercase[:alphabet], *("-" if every else ""))
        self.tested = tuple(hops for hops in (4, 8, 16, 32, 64) if alphabet * hops <= length)

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        if self.alphabet * difficulty > self.length:
            raise UserError(f"task.options.length {self.length} is too short for {difficulty} hops among "
                            f"{self.alphabet} letters; make it {self.alphabet * difficulty} or more")
        while True:
            letters = self._letters(rng)
            found = follow(letters, difficulty)
            if found[-1] < self.length:
                answers = FIRST_LETTER + np.append(letters, self.alphabet)[found]  # the end of a chain: the last symbol
                return blanks([*[HOP] * difficulty, *(FIRST_LETTER + letters)], answers if self.every else answers[-1:])

    def _letters(self, rng: np.random.Generator) -> np.ndarray:
        """Uniform letters, no two neighbours equal: each is 1 to k - 1 places (modulo k) after the last."""
        steps = rng.integers(1, self.alphabet, self.length)
        steps[0] = rng.integers(0, self.alphabet)
        return np.cumsum(steps) % self.alphabet

    def coordinates(self, length: int) -> np.ndarray:
        if not self.every:
            return super().coordinates(length)
        hops = length - 2 * self.length
        return np.array([(row, place) for row, first in ((0, -hops), (1, 0)) for place in range(first, self.length)])


def follow(letters: np.ndarray, hops: int) -> np.ndarray:
    """(n,) places (from 0) that `hops` hops lead to from each of n letters; n if the chain ends before."""
    end = len(letters)
    earlier = np.tril(letters[:, None] == letters, k=-1)
    # The place after the last earlier one of this letter; the end leads to itself.
    hop = np.append(np.where(earlier.any(axis=1), end - earlier[:, ::-1].argmax(axis=1), end), end)
    places = np.arange(end)
    for _ in range(hops):
        places = hop[places]
    return places
