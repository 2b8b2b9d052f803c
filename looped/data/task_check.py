"""Checks of a task before anything is trained on it: what it declares, and a few of its problems, each made twice.

A fault in a task of one's own is seldom an error of its own: a scorer that returns an array, inputs that hold the
answers or draws from `np.random` train and are measured as something else. What a single problem has to be is checked
each time one is made (`Problem`, `Task.problem`).
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from looped.data.task import Cells, Problem, Task, located
from looped.errors import UserError

PROBLEMS = 4
"""Problems of each level and part that are made twice."""

NEEDED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "name": ("a word", lambda value: isinstance(value, str) and value),
    "difficulty": ("what the number counts, in words", lambda value: isinstance(value, str) and value),
    "symbols": ("two different texts or more, the blank first",
                lambda value: isinstance(value, tuple | list) and len(value) == len(set(value)) >= 2
                and all(isinstance(symbol, str) and symbol for symbol in value)),
    "easiest": ("a whole number from 0", lambda value: _is_count(value)),
    "trained": ("(lowest, highest) difficulty, from easiest",
                lambda value: isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_count, value))
                and value[0] <= value[1]),
    "tested": ("one difficulty or more, from easiest",
               lambda value: isinstance(value, tuple | list) and len(value) > 0 and all(map(_is_count, value))),
    "causal": ("'aligned', 'next-token' or None", lambda value: value in ("aligned", "next-token", None)),
}
"""Attribute of a task -> what it is to be in words, and whether a value is that."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 0


def check_declared(task: Task) -> None:
    """Raises UserError for an attribute that is missing or of another kind, and for a `make` that cannot be called."""
    kind = type(task).__qualname__
    for name, (wanted, fits) in NEEDED.items():
        if not hasattr(task, name):
            raise UserError(f"task {kind} has no attribute {name}; give the class {name} = ..., {wanted}")
        if not fits(getattr(task, name)):
            raise UserError(f"task {kind} has {name} {getattr(task, name)!r}; make it {wanted}")
    if min(task.tested) < task.easiest:
        raise UserError(f"task {task.name} tests difficulty {min(task.tested)}, below its easiest, {task.easiest}; "
                        f"raise the one or lower the other")
    if type(task).make is Task.make:
        raise UserError(f"task {task.name} has no make; give the class make(self, rng, difficulty, *, heldout), which "
                        f"returns a Problem")
    try:
        inspect.signature(task.make).bind(None, 1, heldout=False)
    except TypeError as error:
        raise UserError(f"task {task.name}: make cannot be called as make(rng, difficulty, heldout=...): {error}; "
                        f"write it as make(self, rng, difficulty, *, heldout)") from None


class Drawn(NamedTuple):
    """A problem that was made for the check, the numbers it has, and its cells at that moment."""

    problem: Problem
    index: int
    difficulty: int
    heldout: bool
    cells: tuple[bytes, ...]


def check_problems(task: Task, trained: tuple[int, int], *, causal: bool) -> None:
    """Make a few problems of each level that is trained or tested, and check them one by one and together. Raises
    UserError. causal: they are to be asked from left to right."""
    levels = [(difficulty, False) for difficulty in sorted(set(trained))]
    levels += [(difficulty, True) for difficulty in sorted({trained[1], *task.tested})]
    drawn = [_draw(task, index, *level) for level in levels for index in range(PROBLEMS)]
    for check in (_check_kept, _check_again):
        for one in drawn:
            check(task, one)
    _check_answers_hidden(task, drawn)
    _check_layout(task, drawn)
    _check_scorer(task, drawn)
    if causal and task.causal == "next-token":
        _check_first_given(task, drawn)


def _draw(task: Task, index: int, difficulty: int, heldout: bool) -> Drawn:
    problem = task.problem(0, index, difficulty, heldout=heldout)
    return Drawn(problem, index, difficulty, heldout, _cells(problem))


def _cells(problem: Problem) -> tuple[bytes, ...]:
    return problem.inputs.tobytes(), problem.targets.tobytes(), problem.scored.tobytes()


def _place(one: Drawn) -> str:
    return (f"{'held-out' if one.heldout else 'training'} problem of seed 0, index {one.index}, difficulty "
            f"{one.difficulty}")


def _check_again(task: Task, one: Drawn) -> None:
    """A problem is a function of its numbers."""
    if _draw(task, one.index, one.difficulty, one.heldout).cells != one.cells:
        raise UserError(f"task {task.name}, {_place(one)}: make gives another problem on a second call, so that no two "
                        f"models would be measured on the same; draw from rng alone, and keep nothing between calls")


def _check_kept(task: Task, one: Drawn) -> None:
    """Problems that were made later have left it as it was."""
    if _cells(one.problem) != one.cells:
        raise UserError(f"task {task.name}, {_place(one)}: its cells have changed since, as make writes into arrays "
                        f"that it has returned before; give each problem arrays of its own")


def _check_answers_hidden(task: Task, drawn: Sequence[Drawn]) -> None:
    """Some cell of some problem is to be found out. At a single level all may be known: the first sum is the number."""
    if all((one.problem.inputs == one.problem.targets)[one.problem.scored].all() for one in drawn):
        raise UserError(f"task {task.name}: in each of {len(drawn)} problems (the first: {_place(drawn[0])}) inputs "
                        f"holds the answer in every scored cell; put the blank, token 0, where the answer is sought")


def _check_layout(task: Task, drawn: Sequence[Drawn]) -> None:
    """Coordinates and shape belong to the cells of a problem."""
    for one in drawn:
        length = len(one.problem)
        where, shape = task.coordinates(length), task.shape(length)
        kind = getattr(where, "dtype", type(where).__name__), getattr(where, "shape", ())
        if kind[0] != np.int64 or len(kind[1]) != 2 or kind[1][0] != length:
            raise UserError(f"task {task.name}, {_place(one)}: coordinates({length}) gives {kind[0]} of shape "
                            f"{kind[1]}; return an int64 array of shape ({length}, axes)")
        if len(shape) != 2 or shape[0] * shape[1] != length:
            raise UserError(f"task {task.name}, {_place(one)}: shape({length}) gives {shape}; return (rows, columns) "
                            f"whose product is {length}")


def _check_first_given(task: Task, drawn: Sequence[Drawn]) -> None:
    """A text is continued from its first cell on, which nothing asks for."""
    for one in drawn:
        if one.problem.scored[0]:
            raise UserError(f"task {task.name}, {_place(one)}: its first cell is scored, and under task.layout causal "
                            f"nothing before it asks for it; put a given cell there, or set task.layout to full")


def _check_scorer(task: Task, drawn: Sequence[Drawn]) -> None:
    """The reference answer is right; not every other answer is. One that differs may be right as well."""
    refused = False
    for one in drawn:
        with located(task, 0, one.index, one.difficulty, one.heldout):
            if not task.solved_by(one.problem, one.problem.targets.copy()):
                raise UserError(f"task {task.name}, {_place(one)}: is_right says that targets, the problem's own "
                                f"answer, is wrong; mend is_right or make")
            refused |= any(not task.solved_by(one.problem, wrong) for wrong in _others(task, one.problem))
    if not refused:
        raise UserError(f"task {task.name}: is_right says of every answer that it is right, also where all scored "
                        f"cells are other than in targets (tried on {len(drawn)}, the first: {_place(drawn[0])}); let "
                        f"it compare the scored cells of answer with what is right")


def _others(task: Task, problem: Problem) -> list[Cells]:
    """The answer with its first scored cell changed, and with all of them."""
    first = np.flatnonzero(problem.scored)[:1]
    return [np.where(changed, (problem.targets + 1) % len(task.symbols), problem.targets)
            for changed in (np.isin(np.arange(len(problem)), first), problem.scored)]
