"""The eight symmetries of a square grid: turned by quarters, and mirrored or not."""

import numpy as np

from looped.data.task import rng_of
from looped.tasks.hashes import mixed


def turned(grid: np.ndarray, number: int) -> np.ndarray:
    """A symmetry, 0 to 7, of the last two axes of an array; 0 changes nothing."""
    quarters, mirror = number % 4, number // 4
    return np.rot90(grid[..., ::-1] if mirror else grid, quarters, axes=(-2, -1))


class SquareSymmetries:
    """The symmetries of mazes of any side; a `Group` of `puzzle_choice`."""

    def vary(self, question: np.ndarray, answer: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A random symmetry, applied to a question and its answer (side * side,): both as int64."""
        side = int(len(question) ** 0.5)
        both = np.stack([question, answer]).astype(np.int64).reshape(2, side, side)
        question, answer = turned(both, int(rng.integers(8))).reshape(2, -1)
        return question, answer

    def invariants(self, questions: np.ndarray) -> np.ndarray:
        """(N,) uint64 of mazes (N, side * side), the same for symmetric ones: the hashes of all eight, added up."""
        side = int(questions.shape[1] ** 0.5)
        weights = rng_of("maze invariants", side).integers(2**63, size=(side, side), dtype=np.uint64)
        total = np.zeros(len(questions), dtype=np.uint64)
        for number in range(8):
            weight = turned(weights, number).ravel()
            for start in range(0, len(questions), 256):
                total[start : start + 256] += mixed(questions[start : start + 256].astype(np.uint64) @ weight)
        return total

    def canonical(self, question: np.ndarray) -> bytes:
        """The least of the eight."""
        side = int(len(question) ** 0.5)
        return min(turned(question.reshape(side, side), number).tobytes() for number in range(8))
