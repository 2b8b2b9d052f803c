"""Prefix sums: the parity of all bits up to each place (Schwarzschild et al. 2021, "easy-to-hard-data")."""

import numpy as np

from looped.data.task import Problem, Task, register


@register
class PrefixSums(Task):
    """Bits in, their running exclusive or out: every cell is sought, and every cell is given."""

    name = "prefix-sums"
    source = "aks2203/easy-to-hard-data, make_prefixsums.py; Bansal et al. 2022, arXiv 2202.05826"
    difficulty = "bits"
    trained = (1, 16)
    tested = (16, 32, 64)
    symbols = (".", "0", "1")
    causal = "aligned"

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        bits = rng.integers(0, 2, difficulty)
        return Problem(1 + bits, 1 + np.bitwise_xor.accumulate(bits), np.ones(difficulty, dtype=bool))
