"""Puzzles of a file as training and held-out problems: how many train, and under which symmetries.

The public protocol is 1,000 training puzzles with 1,000 symmetries each, and all held-out puzzles as they are (Wang et
al. 2025, arXiv 2506.21734). Under symmetries a training puzzle that is symmetric to a held-out one would show it, so it
is left out; without them only one that is the same.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np

from looped.data.task import Problem, Task, rng_of
from looped.errors import UserError
from looped.tasks.puzzle_files import BLOCK, Faults, Puzzles, Version, read_puzzles, version_of
from looped.tasks.puzzle_levels import Levels


class Group(Protocol):
    """Symmetries of a kind of puzzle. Groups that are equal are the same object."""

    def vary(self, question: np.ndarray, answer: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A random symmetry, applied to a question and its answer, both (L,) and returned as int64."""
        ...

    def invariants(self, questions: np.ndarray) -> np.ndarray:
        """(N,) uint64 of puzzles (N, L), the same for symmetric ones."""
        ...

    def canonical(self, question: np.ndarray) -> bytes:
        """The same for two puzzles (L,) if they are symmetric, and only then."""
        ...


class Variation(Protocol):
    """The change of a training puzzle each time it is drawn."""

    def of(self, question: np.ndarray, answer: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A question and its answer, (L,) int64."""
        ...

    def shows(self, puzzles: Puzzles) -> "Shows":
        """The puzzles with what training on them shows."""
        ...


class AsWritten:
    """No symmetries."""

    def shows(self, puzzles: Puzzles) -> "Shows":
        return Same(puzzles)

    def of(self, question: np.ndarray, answer: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return question.astype(np.int64), answer.astype(np.int64)


class AnySymmetry:
    """A new random symmetry each time."""

    def __init__(self, group: Group) -> None:
        self.group: Group = group

    def shows(self, puzzles: Puzzles) -> "Shows":
        return Shown(puzzles, self.group)

    def of(self, question: np.ndarray, answer: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self.group.vary(question, answer, rng)


class SomeSymmetries:
    """The puzzle itself, or one of `num` symmetric ones that are the same each time."""

    def __init__(self, group: Group, num: int) -> None:
        self.group: Group = group
        self.num: int = num

    def shows(self, puzzles: Puzzles) -> "Shows":
        return Shown(puzzles, self.group)

    def of(self, question: np.ndarray, answer: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        variant = int(rng.integers(self.num + 1))
        if variant == 0:
            return question.astype(np.int64), answer.astype(np.int64)
        return self.group.vary(question, answer, rng_of("symmetry", question.tobytes().hex(), variant))


def variation_of(symmetries: bool | int, group: Group) -> Variation:
    """The variation of the option `symmetries`. Raises UserError for a value that is neither bool nor a count."""
    if isinstance(symmetries, bool):
        return AnySymmetry(group) if symmetries else AsWritten()
    if not isinstance(symmetries, int) or symmetries < 0:
        raise UserError(f"task.options.symmetries {symmetries!r} is neither a number of symmetric puzzles per training "
                        f"puzzle nor true (any of them); write 1000, as the public protocol, true, or 0 for none")
    return SomeSymmetries(group, symmetries) if symmetries else AsWritten()


def check_needs_path(path: object, options: Mapping[str, object]) -> None:
    """Raises UserError for options of a file, name -> value, that are set without one."""
    for name, value in options.items():
        if value and path is None:
            raise UserError(f"task.options.{name} {value} is for the puzzles of a file, and task.options.path is not "
                            f"set; set it, or leave {name} out")


def chosen_puzzles(path: str, symbols: str, faults: Faults, group: Group | None, num_puzzles: int | None,
                   ) -> tuple[Puzzles, Puzzles]:
    """(training, held-out) puzzles of a file, `num_puzzles` of the former (None: all), in the order of the file.

    group: the symmetries that training applies, if any. Training puzzles that are held-out ones too, or symmetric to
    one of them, are left out, and a notice says how many were met. Raises UserError for files that `read_puzzles`
    refuses, and if too few are left.
    """
    _check_number(num_puzzles)
    return _chosen(path, version_of(path), symbols, faults, group, num_puzzles)


@lru_cache(maxsize=2)
def _chosen(path: str, version: Version, symbols: str, faults: Faults, group: Group | None,
            num_puzzles: int | None) -> tuple[Puzzles, Puzzles]:
    train, heldout = read_puzzles(path, symbols, faults)
    total = len(train.questions)
    wanted = total if num_puzzles is None else num_puzzles
    order = np.arange(total) if num_puzzles is None else rng_of("training puzzles").permutation(total)
    known = Shown(heldout, group) if group else Same(heldout)
    rows, left_out, met = [], 0, 0
    while len(rows) < wanted and met < total:
        some = order[met : met + min(BLOCK, wanted - len(rows))]
        kept = some[~known.among(train.questions[some])]
        rows, left_out, met = [*rows, *kept.tolist()], left_out + len(some) - len(kept), met + len(some)
    if not rows and group is None:  # one set in both parts, to measure on
        rows = order.tolist()
        warnings.warn(f"task.options.path: all {total} training puzzles of {path} are held-out ones too; measure runs "
                      f"on it, but train on others", stacklevel=3)
    elif left_out:
        warnings.warn(f"task.options.{'symmetries' if group else 'path'}: {left_out} of the {met} training puzzles "
                      f"taken from {path} are {'symmetric to a held-out one' if group else 'held-out ones too'} and "
                      f"were left out", stacklevel=3)
    if len(rows) < (num_puzzles or 1):
        shown = "symmetric to a held-out one" if group else "held-out ones too"
        such = f" that are not {shown}" if left_out else ""
        raise UserError(f"task.options.num_puzzles: {path} has {len(rows)} training puzzles{such}, not "
                        f"{num_puzzles or 'one'}; take fewer, or a larger file")
    return (train if len(rows) == total else train.where(np.sort(rows))), heldout


def _check_number(num_puzzles: int | None) -> None:
    number = isinstance(num_puzzles, int) and not isinstance(num_puzzles, bool) and num_puzzles > 0
    if num_puzzles is not None and not number:
        raise UserError(f"task.options.num_puzzles {num_puzzles!r} is not a number of training puzzles; write 1000, or "
                        f"null for all")


class Shows(Protocol):
    """Some puzzles of a file, and what shows them to a model."""

    def among(self, questions: np.ndarray) -> np.ndarray:
        """Mask (N,) of the puzzles (N, L) that show one of them."""
        ...


class Same:
    """Puzzles that are shown by themselves alone."""

    def __init__(self, puzzles: Puzzles) -> None:
        self._known = {question.tobytes() for question in puzzles.questions}

    def among(self, questions: np.ndarray) -> np.ndarray:
        given = np.ascontiguousarray(questions, dtype=np.uint8)
        return np.array([question.tobytes() in self._known for question in given], dtype=bool)


class Shown:
    """Puzzles that are shown by symmetric ones: found by invariants, and made sure of by canonical forms."""

    def __init__(self, puzzles: Puzzles, group: Group) -> None:
        self._heldout, self._group = puzzles.questions, group
        self._invariants = group.invariants(self._heldout)
        self._known = np.unique(self._invariants)

    def among(self, questions: np.ndarray) -> np.ndarray:
        invariants = self._group.invariants(questions)
        found = np.isin(invariants, self._known)
        for row in np.flatnonzero(found):
            found[row] = self._group.canonical(questions[row]) in self._forms(int(invariants[row]))
        return found

    @lru_cache  # noqa: B019 (an object lives as long as one reading of a file)
    def _forms(self, invariant: int) -> frozenset[bytes]:
        """The canonical forms of the puzzles with an invariant."""
        return frozenset(map(self._group.canonical, self._heldout[self._invariants == np.uint64(invariant)]))


class FilePuzzles:
    """Problems of a file: in training a random puzzle of a difficulty, varied; held out each once, as written."""

    def __init__(self, parts: tuple[Puzzles, Puzzles], levels: Levels, variation: Variation) -> None:
        self.parts: tuple[Puzzles, Puzzles] = parts
        self.levels: Levels = levels
        self._variation: Variation = variation
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    @cached_property
    def digest(self) -> bytes:
        """Of all puzzles and ratings of both parts."""
        digest = hashlib.sha256()
        for part in self.parts:
            for column in part:
                digest.update(str(column.shape).encode() + np.ascontiguousarray(column).tobytes())
        return digest.digest()

    def trained_on(self, questions: np.ndarray) -> np.ndarray:
        """Mask (N,) of the puzzles (N, L) that training shows."""
        return self._variation.shows(self.parts[False]).among(questions)

    def set_levels_of(self, task: Task) -> None:
        """Give a task the difficulties of the file."""
        for name in ("difficulty", "easiest", "trained", "tested"):
            setattr(task, name, getattr(self.levels, name))

    def training(self, rng: np.random.Generator, difficulty: int) -> tuple[np.ndarray, np.ndarray]:
        """(question, answer) of a random training puzzle, (L,) int64."""
        rows, part = self.levels.rows(difficulty, False), self.parts[False]
        row = rows[rng.integers(len(rows))]
        return self._variation.of(part.questions[row], part.answers[row], rng)

    def heldout(self, seed: int, index: int, difficulty: int) -> tuple[np.ndarray, np.ndarray]:
        """(question, answer) of the `index`-th held-out puzzle in the random order of a seed, (L,) int64; after the
        last one they begin again."""
        if (seed, difficulty) not in self._orders:
            rows = self.levels.rows(difficulty, True)
            self._orders[seed, difficulty] = rng_of("held-out order", seed, difficulty).permutation(rows)
        order, part = self._orders[seed, difficulty], self.parts[True]
        row = order[index % len(order)]
        return part.questions[row].astype(np.int64), part.answers[row].astype(np.int64)


class FromFile(Task):
    """A task whose puzzles come from `file` if it is given; else `make` generates them."""

    file: FilePuzzles | None = None

    @property
    def contents(self) -> bytes:
        return b"" if self.file is None else self.file.digest

    def num_trained_on(self, problems: Sequence[Problem]) -> int:
        if self.file is None:
            return super().num_trained_on(problems)
        length = self.file.parts[False].questions.shape[1]
        asked = [problem.inputs for problem in problems if len(problem.inputs) == length]
        return int(self.file.trained_on(np.array(asked, dtype=np.uint8)).sum()) if asked else 0

    def pose(self, question: np.ndarray, answer: np.ndarray) -> Problem:
        """The problem of a question and its answer, both (L,) int64."""
        raise NotImplementedError

    def draw(self, seed: int, index: int, difficulty: int, *, heldout: bool) -> Problem:
        if self.file is None:
            return super().draw(seed, index, difficulty, heldout=heldout)
        if heldout:
            return self.pose(*self.file.heldout(seed, index, difficulty))
        rng = rng_of(self.name, seed, index, difficulty, heldout)
        return self.pose(*self.file.training(rng, difficulty))

    def num_heldout(self, difficulty: int) -> int | None:
        return None if self.file is None else len(self.file.levels.rows(difficulty, True))
