"""Tasks that need depth: problems with checkable answers, each a function of (seed, index, difficulty).

A problem is a row of cells. `inputs` holds what is given, with the blank (token 0) where something is sought, `targets`
one right answer; both are rows of tokens of the task's `symbols`. A grid is a row of cells with coordinates. A task is
found by its name (`find_task`): a file of `looped.tasks` registers it, or a dotted path names a class of one's own.
"""

import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from looped.errors import UserError, did_you_mean

BLANK = 0
"""The token of a cell whose content is sought; also that of cells which only fill up a batch."""

Cells = np.ndarray  # (L,) int64 tokens


@dataclass(frozen=True)
class Problem:
    """One problem of L cells. `scored` marks the cells that are sought, and which alone are trained on.

    Everywhere else `targets` repeats `inputs`: what is given is known.
    """

    inputs: Cells
    targets: Cells
    scored: np.ndarray  # (L,) bool

    def __len__(self) -> int:
        return len(self.inputs)


class Task:
    """A family of problems; subclasses give `make`, and what else is not as here.

    name: as in `task.name`. symbols: what the tokens 0, 1, ... stand for, the blank first. difficulty: what the number
    counts, in words; `easiest` is the lowest there is, `trained` the range that training draws from unless the config
    says otherwise, `tested` the levels that are measured. causal: how the task is brought to a causal model, `aligned`
    (the answer of a cell depends on the inputs up to it), `next-token` (question, then answer) or None (not at all).
    """

    name: ClassVar[str]
    source: ClassVar[str]
    """Where the exact definition is from."""
    difficulty: ClassVar[str]
    easiest: int = 1
    trained: tuple[int, int]
    tested: tuple[int, ...]
    symbols: tuple[str, ...]
    causal: ClassVar[Literal["aligned", "next-token"] | None] = None

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        """A problem drawn with `rng`. `heldout`: for measuring; a task that varies a fixed stock of problems takes them
        from another part of it than those for training."""
        raise NotImplementedError

    def problem(self, seed: int, index: int, difficulty: int, *, heldout: bool = False) -> Problem:
        """The problem of these numbers, the same on every call. Raises UserError for a difficulty there is not."""
        if difficulty < self.easiest:
            raise UserError(f"{self.name} begins at difficulty {self.easiest} ({self.difficulty}), got {difficulty}")
        return self.make(rng_of(self.name, seed, index, difficulty, heldout), difficulty, heldout=heldout)

    def is_right(self, problem: Problem, answer: Cells) -> bool:
        """Whether `answer` (L,) solves the problem; cells that are not scored are ignored. Where several answers are
        right, all of them count."""
        return bool((answer == problem.targets)[problem.scored].all())

    def coordinates(self, length: int) -> np.ndarray:
        """Where the cells of a problem of `length` cells stand: (L, A) whole numbers, an axis a column."""
        return np.arange(length)[:, None]

    def shape(self, length: int) -> tuple[int, int]:
        """(rows, columns) in which a problem of `length` cells is shown."""
        return 1, length

    colors: ClassVar[Mapping[str, str]] = {}
    """Symbols that a picture shows as cells of a colour; the others are written out."""
    box: tuple[int, int] | None = None
    """(rows, columns) of the boxes that a picture draws thicker lines around."""

    def tokens(self, text: Sequence[str]) -> Cells:
        """Symbols -> tokens."""
        place = {symbol: token for token, symbol in enumerate(self.symbols)}
        return np.array([place[symbol] for symbol in text], dtype=np.int64)

    def show(self, cells: Cells) -> str:
        """Cells as lines of text."""
        rows, columns = self.shape(len(cells))
        wide = max(len(symbol) for symbol in self.symbols) > 1
        lines = [[self.symbols[token] for token in row] for row in np.reshape(cells, (rows, columns))]
        return "\n".join((" " if wide else "").join(line) for line in lines)


def blanks(given: Sequence[int | np.integer] | Cells, answer: Sequence[int | np.integer] | Cells) -> Problem:
    """A question, and after it as many blanks as its answer has cells (for tasks that are causal by `next-token`)."""
    given, answer = np.asarray(given, dtype=np.int64), np.asarray(answer, dtype=np.int64)
    scored = np.arange(len(given) + len(answer)) >= len(given)
    return Problem(np.concatenate([given, np.full_like(answer, BLANK)]), np.concatenate([given, answer]), scored)


def after_start(marker: int, given: Cells, answer: Cells) -> Problem:
    """Cells that are given and sought, each in its place, after a start marker that is only given."""
    scored = np.arange(1 + len(given)) > 0
    return Problem(np.array([marker, *given]), np.array([marker, *answer]), scored)


def check_columns(columns: Any) -> None:
    """Raises UserError for an option `columns` that is neither true nor false."""
    if not isinstance(columns, bool):
        raise UserError(f"task.options.columns {columns!r} is neither true (cells in columns, as on paper) nor false")


def next_token(problem: Problem) -> Problem:
    """The problem as a text to continue: row i holds the right token i and asks for the one after it."""
    return Problem(problem.targets[:-1], problem.targets[1:], problem.scored[1:])


def rng_of(*key: int | str | bool) -> np.random.Generator:
    """A generator seeded by the hash of a key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


# ---- finding them ----------------------------------------------------------------------------------------------------

_REGISTERED: dict[str, Callable[..., Task]] = {}


def register(task: type[Task]) -> type[Task]:
    """Make a class known by its name (a decorator)."""
    _REGISTERED[task.name] = task
    return task


def task_names() -> list[str]:
    """Every task that is known by name."""
    package = importlib.import_module("looped.tasks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"looped.tasks.{module.name}")
    return sorted(_REGISTERED)


def find_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of a name (`sudoku`) or of a dotted path to a class (`my.module.MyTask`), made with its options.

    Raises UserError for names that are unknown, and for options that the task has not or does not take.
    """
    made = _by_path(name) if "." in name else _by_name(name)
    options = dict(options or {})
    known = [key for key in inspect.signature(made).parameters if key != "self"]
    for key in options:
        if key not in known:
            raise UserError(f"task.options: {name} has no option '{key}'"
                            + (did_you_mean(key, known) if known else "; it takes none"))
    try:
        return made(**options)
    except TypeError as error:
        raise UserError(f"task.options do not fit {name}: {error}") from None


def _by_name(name: str) -> Callable[..., Task]:
    names = task_names()
    if name not in names:
        raise UserError(f"no task '{name}'{did_you_mean(name, names)}")
    return _REGISTERED[name]


def _by_path(path: str) -> Callable[..., Task]:
    module, _, name = path.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"task.name {path} cannot be imported: {error}; give the dotted path of a class") from None
    if not (isinstance(made, type) and issubclass(made, Task)):
        raise UserError(f"task.name {path} is no task; give the dotted path of a subclass of looped.data.task.Task")
    return made
