"""Word problems of groups: the running product of a word of group elements.

S5 and A5 are not solvable, so their word problems are NC1-complete: a model of constant depth cannot solve every length
(unless TC0 = NC1); one whose depth grows can.
"""

from itertools import accumulate, permutations
from typing import ClassVar, Literal

import numpy as np

from looped.data.task import Problem, Task, after_start, register
from looped.errors import UserError


def is_even(permutation: tuple[int, ...]) -> bool:
    """True for an even number of inversions."""
    return sum(a > b for place, a in enumerate(permutation) for b in permutation[place + 1:]) % 2 == 0


def multiplication_table(elements: list[tuple[int, ...]]) -> np.ndarray:
    """table[a, b] = index of the product a·b, a first: (a·b)(k) = b(a(k)). (G, G), indices into `elements`."""
    number = {element: at for at, element in enumerate(elements)}
    return np.array([[number[tuple(b[k] for k in a)] for b in elements] for a in elements])


class WordProblem(Task):
    """The start marker `^`, then n uniform factors x_1 ... x_n; the target at place i is the product x_1·x_2·...·x_i,
    the factors applied left to right.

    Elements are permutations p of 0 ... 4, written as p(0) p(1) ... p(4), in lexicographic order: token 1 is the
    identity 01234.

    moved: the most things that a factor moves, all five by default. With fewer (2: only transpositions; 3: 3-cycles as
    well) products still reach the whole group, and a model has fewer pairs of an element and a factor to learn.
    """

    source = ("Merrill et al. 2024, The illusion of state in state-space models, arXiv 2404.08819; "
              "factors that move few things: Grazzi et al. 2024, arXiv 2411.12537")
    difficulty = "factors"
    trained: tuple[int, int] = (1, 16)
    tested: tuple[int, ...] = (16, 32, 64)
    causal: ClassVar[Literal["aligned", "next-token"] | None] = "aligned"
    elements: ClassVar[list[tuple[int, ...]]]

    def __init__(self, *, moved: int = 5) -> None:
        num_moved = [sum(image != thing for thing, image in enumerate(element)) for element in self.elements]
        if moved not in set(num_moved) - {0}:
            raise UserError(f"task.options.moved {moved!r} is not a number of things that an element of {self.name} "
                            f"moves; take one of {', '.join(map(str, sorted(set(num_moved) - {0})))}")
        self.table: np.ndarray = multiplication_table(self.elements)
        self.factors: np.ndarray = np.flatnonzero(np.array(num_moved) <= moved)
        self.symbols: tuple[str, ...] = (".", *("".join(map(str, element)) for element in self.elements), "^")

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        word = self.factors[rng.integers(0, len(self.factors), difficulty)]
        products = list(accumulate(word, lambda product, factor: self.table[product, factor]))
        return after_start(1 + len(self.table), 1 + word, 1 + np.array(products))


ALL = list(permutations(range(5)))
EVEN = [element for element in ALL if is_even(element)]


@register
class S5(WordProblem):
    """The running product of uniform elements of S5, the 120 permutations of five things; as in `WordProblem`."""

    name = "s5"
    elements = ALL


@register
class A5(WordProblem):
    """The running product of uniform elements of A5, the 60 even permutations of five; as in `WordProblem`."""

    name = "a5"
    elements = EVEN
