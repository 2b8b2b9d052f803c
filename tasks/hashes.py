"""Hashes of whole arrays of numbers, for invariants of puzzles."""

import numpy as np


def mixed(numbers: np.ndarray) -> np.ndarray:
    """A hash of every number, uint64 to uint64: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return numbers ^ numbers >> np.uint64(31)
