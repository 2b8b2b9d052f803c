"""Parity of a sequence of bits: 1 if the number of ones is odd."""

import numpy as np

from looped.data.task import Problem, Task, blanks, register


@register
class Parity(Task):
    """n uniform bits, the end marker `=`, and one answer cell: the sum of the bits modulo 2.

    The end marker tells a causal model that no further bit follows. The paper needs n loops for n bits, and trains on
    lengths up to 20.
    """

    name = "parity"
    source = "Fan et al. 2024, Looped transformers for length generalization, arXiv 2409.15647"
    difficulty = "bits"
    trained = (1, 20)
    tested = (20, 30, 40)
    symbols = (".", "0", "1", "=")
    causal = "next-token"

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        bits = rng.integers(0, 2, difficulty)
        return blanks([*(1 + bits), 3], [1 + bits.sum() % 2])
