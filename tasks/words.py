"""Word problems of groups: the running product of a word of group elements.

S5 and A5 are not solvable, so that their word problems are complete for NC1: a model of constant depth cannot answer
at every length (unless TC0 = NC1), one whose depth grows can.
"""

from itertools import accumulate, permutations

import numpy as np

from looped.data.task import Problem, Task, after_start, register


def is_even(permutation: tuple[int, ...]) -> bool:
    """Whether an even number of pairs stand in the wrong order."""
    return sum(a > b for place, a in enumerate(permutation) for b in permutation[place + 1:]) % 2 == 0


def multiplication_table(elements: list[tuple[int, ...]]) -> np.ndarray:
    """table[a, b] = number of the product a·b, a first: (a·b)(k) = b(a(k)). (G, G), numbers as in `elements`."""
    number = {element: at for at, element in enumerate(elements)}
    return np.array([[number[tuple(b[k] for k in a)] for b in elements] for a in elements])


class WordProblem(Task):
    """The start marker `^`, then n uniform elements x_1 ... x_n in; at place i the product x_1·x_2·...·x_i, the factors
    applied left to right.

    Elements are permutations p of 0 ... 4, written as p(0) p(1) ... p(4), in lexicographic order: token 1 is the
    identity 01234.
    """

    source = "Merrill et al. 2024, The illusion of state in state-space models, arXiv 2404.08819"
    difficulty = "factors"
    trained = (1, 16)
    tested = (16, 32, 64)
    causal = "aligned"
    table: np.ndarray

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        word = rng.integers(0, len(self.table), difficulty)
        products = list(accumulate(word, lambda product, factor: self.table[product, factor]))
        return after_start(1 + len(self.table), 1 + word, 1 + np.array(products))


def symbols_of(elements: list[tuple[int, ...]]) -> tuple[str, ...]:
    return (".", *("".join(map(str, element)) for element in elements), "^")


ALL = list(permutations(range(5)))
EVEN = [element for element in ALL if is_even(element)]


@register
class S5(WordProblem):
    """The running product of uniform elements of S5, the 120 permutations of five things; as in `WordProblem`."""

    name = "s5"
    symbols = symbols_of(ALL)
    table = multiplication_table(ALL)


@register
class A5(WordProblem):
    """The running product of uniform elements of A5, the 60 even permutations of five; as in `WordProblem`."""

    name = "a5"
    symbols = symbols_of(EVEN)
    table = multiplication_table(EVEN)
