"""Tasks that need depth: problems with checkable answers, each a function of (seed, index, difficulty).

A problem is a sequence of cells. `inputs` holds the question, with the blank (token 0) in cells to predict, `targets`
one right answer; both are tokens of the task's `symbols`. A grid is a sequence of cells with coordinates. `find_task`
finds a task by its name, which a file of `looped.tasks` registers, or by the dotted path of a custom class.
"""

import hashlib
import importlib
import inspect
import pkgutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from looped.errors import UserError, did_you_mean
from looped.import_path import class_at

BLANK = 0
"""The token of a cell to predict; also of padding cells in a batch."""

Cells = np.ndarray  # (L,) int64 tokens


class Malformed(UserError):
    """A problem's cells are invalid. The context manager `located` adds the task, seed, index and difficulty."""


@dataclass(frozen=True)
class Problem:
    """One problem of L cells. `scored` marks the cells to predict, the only ones in the loss.

    In the other cells `targets` repeats `inputs`. Raises Malformed, a UserError, for cells of other types or lengths;
    nothing is converted, since 0 and 1 in place of a boolean mask would select other cells.
    """

    inputs: Cells
    targets: Cells
    scored: np.ndarray  # (L,) bool

    def __post_init__(self) -> None:
        for name, wanted in (("inputs", np.int64), ("targets", np.int64), ("scored", np.bool_)):
            _check_cells(name, getattr(self, name), np.dtype(wanted))
        lengths = {name: len(getattr(self, name)) for name in ("inputs", "targets", "scored")}
        if len(set(lengths.values())) > 1:
            raise Malformed(f"{', '.join(f'{name} has {length} cells' for name, length in lengths.items())}; give all "
                            f"three the same length")
        if not self.scored.any():
            raise Malformed("no cell is scored, so there is nothing to predict; set scored in the cells of the answer")

    def __len__(self) -> int:
        return len(self.inputs)


def _check_cells(name: str, cells: Any, wanted: np.dtype) -> None:
    """Raises Malformed unless `cells` is a non-empty 1-D array of the wanted type."""
    if not isinstance(cells, np.ndarray):
        raise Malformed(f"{name} is of type {type(cells).__name__}, not a numpy array; give np.array(..., "
                        f"dtype={_spelled(wanted)})")
    if cells.dtype != wanted:
        raise Malformed(f"{name} holds {cells.dtype}, not {wanted}; give {name}.astype({_spelled(wanted)})")
    if cells.ndim != 1 or not len(cells):
        raise Malformed(f"{name} has shape {cells.shape}; give a 1-D array of one cell or more, a grid row by row")


def _spelled(dtype: np.dtype) -> str:
    return "bool" if dtype.kind == "b" else f"np.{dtype}"


class Task:
    """A family of problems; subclasses define `make`, and override other members where they differ.

    name: the value of `task.name`. symbols: the meaning of tokens 0, 1, ..., the blank first. difficulty: what the
    difficulty counts, in words; `easiest` is the lowest, `trained` the default range in training, `tested` the levels
    of an evaluation. causal: the layout for a causal model, `aligned` (the answer of a cell depends on the inputs up to
    it), `next-token` (question, then answer) or None (there is none).
    """

    name: ClassVar[str]
    source: ClassVar[str]
    """Reference for the exact definition."""
    difficulty: ClassVar[str]
    easiest: int = 1
    trained: tuple[int, int]
    tested: tuple[int, ...]
    symbols: tuple[str, ...]
    causal: ClassVar[Literal["aligned", "next-token"] | None] = None
    one_per_difficulty: bool = False
    """True if a difficulty has a single problem (the tower of n discs), so that only levels beyond the trained ones are
    unseen."""

    contents: bytes = b""
    """A digest of what problems are taken from other than the seed, as the puzzles of a file."""

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        """A problem drawn with `rng`. heldout: for evaluation; a task that varies a fixed stock of problems keeps
        separate parts of it for training and evaluation."""
        raise NotImplementedError

    def draw(self, seed: int, index: int, difficulty: int, *, heldout: bool) -> Problem:
        """The problem of a number, by `make` from a random stream of its own. A task with a fixed stock of held-out
        problems overrides it, so that each is taken once."""
        return self.make(rng_of(self.name, seed, index, difficulty, heldout), difficulty, heldout=heldout)

    def num_heldout(self, difficulty: int) -> int | None:
        """Number of held-out problems of a difficulty, beyond which an evaluation does not go; None: no limit."""
        return None

    def problem(self, seed: int, index: int, difficulty: int, *, heldout: bool = False) -> Problem:
        """The problem of this seed, index and difficulty, the same on every call. Raises UserError for a difficulty
        below `easiest`, and if `make` does not return a problem in this task's symbols."""
        if difficulty < self.easiest:
            raise UserError(f"{self.name} begins at difficulty {self.easiest} ({self.difficulty}), got {difficulty}")
        problem = None
        with located(self, seed, index, difficulty, heldout):
            problem = self.draw(seed, index, difficulty, heldout=heldout)
            self._check_made(problem)
        return problem

    def num_trained_on(self, problems: Sequence["Problem"]) -> int:
        """The number of these problems that training on a file shows; 0 for problems that are drawn anew each time."""
        return 0

    def options_for_file(self, path: str) -> dict[str, Any]:
        """The options under which this task takes its puzzles from a file. Raises UserError if it reads none."""
        raise UserError(f"task {self.name} reads no puzzles from files; leave --puzzles {path} out")

    def _check_made(self, problem: Any) -> None:
        """Raises Malformed if `make` returned no valid problem."""
        if not isinstance(problem, Problem):
            raise Malformed(f"make returns {type(problem).__name__}, not a problem; return Problem(inputs, targets, "
                            f"scored)")
        for name in ("inputs", "targets"):
            cells = getattr(problem, name)
            if cells.min() < 0 or cells.max() >= len(self.symbols):
                cell = int(np.flatnonzero((cells < 0) | (cells >= len(self.symbols)))[0])
                raise Malformed(f"{name} has token {cells[cell]} in cell {cell}, but symbols has tokens 0 to "
                                f"{len(self.symbols) - 1}; add the symbol, or fix make")
        unlike = np.flatnonzero((problem.inputs != problem.targets) & ~problem.scored)
        if len(unlike):
            raise Malformed(f"cell {unlike[0]} is given, not scored, but inputs has {problem.inputs[unlike[0]]} there "
                            f"and targets {problem.targets[unlike[0]]}; repeat inputs in targets, or score the cell")

    def solved_by(self, problem: Problem, answer: Cells) -> bool:
        """The verdict of `is_right` on an answer. Raises UserError if it is not a bool."""
        right = self.is_right(problem, answer)
        if not isinstance(right, bool | np.bool_):
            shape = f" of shape {right.shape}" if isinstance(right, np.ndarray) else ""
            raise UserError(f"task {self.name}: is_right returns {type(right).__name__}{shape}, not True or False; "
                            f"return for instance bool((answer == problem.targets)[problem.scored].all())")
        return bool(right)

    def is_right(self, problem: Problem, answer: Cells) -> bool:
        """True if `answer` (L,) solves the problem; cells that are not scored are ignored. If several answers are
        right, all of them count."""
        return bool((answer == problem.targets)[problem.scored].all())

    def coordinates(self, length: int) -> np.ndarray:
        """Coordinates of the cells of a problem of `length` cells: (L, A) int64, one column per axis."""
        return np.arange(length)[:, None]

    def shape(self, length: int) -> tuple[int, int]:
        """(rows, columns) in which a problem of `length` cells is shown."""
        return 1, length

    colors: ClassVar[Mapping[str, str]] = {}
    """Symbol -> colour of its cells in plots; other symbols are written as text."""
    box: tuple[int, int] | None = None
    """(rows, columns) of the boxes that plots outline with thicker lines."""

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


@contextmanager
def located(task: Task, seed: int, index: int, difficulty: int, heldout: bool) -> Iterator[None]:
    """Prefixes errors with the task and the seed, index and difficulty of the problem. Raises UserError; an exception
    in the task's code is its cause."""
    place = (f"task {task.name}, {'held-out' if heldout else 'training'} problem of seed {seed}, index {index}, "
             f"difficulty {difficulty}")
    try:
        yield
    except Malformed as error:
        raise UserError(f"{place}: {error}") from None
    except (UserError, NotImplementedError):
        raise
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(f"{place}: {type(error).__name__} in {line.name} ({line.filename}:{line.lineno}): "
                        f"{' '.join(str(error).split())}; fix the task") from error


def blanks(given: Sequence[int | np.integer] | Cells, answer: Sequence[int | np.integer] | Cells) -> Problem:
    """A question followed by one blank per cell of its answer (for tasks whose `causal` is `next-token`)."""
    given, answer = np.asarray(given, dtype=np.int64), np.asarray(answer, dtype=np.int64)
    scored = np.arange(len(given) + len(answer)) >= len(given)
    return Problem(np.concatenate([given, np.full_like(answer, BLANK)]), np.concatenate([given, answer]), scored)


def after_start(marker: int, given: Cells, answer: Cells) -> Problem:
    """Cells that each have an input and a target to predict, after a start marker that is not scored."""
    scored = np.arange(1 + len(given)) > 0
    return Problem(np.array([marker, *given]), np.array([marker, *answer]), scored)


def check_columns(columns: Any) -> None:
    """Raises UserError for an option `columns` that is neither true nor false."""
    if not isinstance(columns, bool):
        raise UserError(f"task.options.columns {columns!r} is neither true (cells in columns, as on paper) nor false")


def next_token(problem: Problem) -> Problem:
    """The problem as next-token prediction: row i holds the right token i and predicts the one after it."""
    return Problem(problem.targets[:-1], problem.targets[1:], problem.scored[1:])


def rng_of(*key: int | str | bool) -> np.random.Generator:
    """A generator seeded by the hash of a key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


# ---- registry --------------------------------------------------------------------------------------------------------

_REGISTERED: dict[str, Callable[..., Task]] = {}


def register(task: type[Task]) -> type[Task]:
    """Registers a task class under its name (a decorator)."""
    _REGISTERED[task.name] = task
    return task


def task_names() -> list[str]:
    """The names of all registered tasks."""
    package = importlib.import_module("looped.tasks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"looped.tasks.{module.name}")
    return sorted(_REGISTERED)


def find_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of a name (`sudoku`) or of a dotted path to a class (`my.module.MyTask`), created with its options.

    Raises UserError for unknown names, and for options that the task does not have or does not accept.
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
        raise UserError(f"task.options do not fit {name}: {error}; its options are {', '.join(known) or 'none'}"
                        ) from None


def _by_name(name: str) -> Callable[..., Task]:
    names = task_names()
    if name not in names:
        raise UserError(f"unknown task '{name}'{did_you_mean(name, names)}")
    return _REGISTERED[name]


def _by_path(path: str) -> Callable[..., Task]:
    made = class_at(path, "task.name")
    if not (isinstance(made, type) and issubclass(made, Task)):
        raise UserError(f"task.name {path} is not a task; give the dotted path of a subclass of looped.data.task.Task")
    return made
