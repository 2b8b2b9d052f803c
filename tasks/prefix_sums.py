"""Prefix sums: the parity of all bits up to each place (Schwarzschild et al. 2021, "easy-to-hard-data")."""

import numpy as np

from looped.data.task import Problem, Task, after_start, register


@register
class PrefixSums(Task):
    """The start marker `^`, then n uniform bits; the target of each bit's cell is the running exclusive or.

    The marker distinguishes the first bit from one whose left neighbour is not known yet; the published networks, which
    are convolutional, see this from the zero padding.
    """

    name = "prefix-sums"
    source = "aks2203/easy-to-hard-data, make_prefixsums.py; Bansal et al. 2022, arXiv 2202.05826"
    difficulty = "bits"
    trained = (1, 16)
    tested = (16, 32, 64)
    symbols = (".", "0", "1", "^")
    causal = "aligned"

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        bits = rng.integers(0, 2, difficulty)
        return after_start(3, 1 + bits, 1 + np.bitwise_xor.accumulate(bits))
