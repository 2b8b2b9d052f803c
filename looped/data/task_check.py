"""Checks of a task before training: the attributes that it declares, and a few of its problems, each made twice.

Many mistakes in a custom task raise no error: with a scorer that returns an array, inputs that contain the answers,
draws from `np.random` or from a generator seeded by the difficulty, training runs but measures something else. Single
problems are checked each time one is made (`Problem`, `Task.problem`).
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from looped.data.task import Cells, Problem, Task, located
from looped.errors import UserError

PROBLEMS = 4
"""Number of problems per level and part (training, held-out) that are made twice."""
MORE = 32
"""Number of further problems of the hardest trained level, where the first ones of a part are all the same."""

NEEDED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "name": ("a word", lambda value: isinstance(value, str) and value),
    "difficulty": ("what the number counts, in words", lambda value: isinstance(value, str) and value),
    "symbols": ("two or more different strings, the blank first",
                lambda value: isinstance(value, tuple | list) and len(value) == len(set(value)) >= 2
                and all(isinstance(symbol, str) and symbol for symbol in value)),
    "easiest": ("a whole number from 0", lambda value: _is_count(value)),
    "trained": ("(lowest, highest) difficulty, from easiest",
                lambda value: isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_count, value))
                and value[0] <= value[1]),
    "tested": ("difficulties from easiest, or () for the hardest trained one",
               lambda value: isinstance(value, tuple | list) and all(map(_is_count, value))),
    "causal": ("'aligned', 'next-token' or None", lambda value: value in ("aligned", "next-token", None)),
    "one_per_difficulty": ("True or False", lambda value: isinstance(value, bool)),
}
"""Attribute of a task -> (description of valid values, check of a value)."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 0


def check_declared(task: Task) -> None:
    """Raises UserError for a missing or invalid attribute, and for a `make` with another signature."""
    kind = type(task).__qualname__
    for name, (wanted, fits) in NEEDED.items():
        if not hasattr(task, name):
            raise UserError(f"task {kind} has no attribute {name}; give the class {name} = ..., {wanted}")
        if not fits(getattr(task, name)):
            raise UserError(f"task {kind} has {name} {getattr(task, name)!r}; make it {wanted}")
    if min(task.tested, default=task.easiest) < task.easiest:
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
    """A problem made for the check, its index, difficulty and part, and a copy of its cells at that time."""

    problem: Problem
    index: int
    difficulty: int
    heldout: bool
    cells: tuple[bytes, ...]


def check_problems(task: Task, trained: tuple[int, int], *, causal: bool) -> None:
    """Make a few problems of each trained or tested level, and check them one by one and together. Raises UserError.
    causal: also check them for the causal layout."""
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
    _check_drawn(task, drawn, trained[1])


def _draw(task: Task, index: int, difficulty: int, heldout: bool) -> Drawn:
    problem = task.problem(0, index, difficulty, heldout=heldout)
    return Drawn(problem, index, difficulty, heldout, _cells(problem))


def _cells(problem: Problem) -> tuple[bytes, ...]:
    return problem.inputs.tobytes(), problem.targets.tobytes(), problem.scored.tobytes()


def _place(one: Drawn) -> str:
    return (f"{'held-out' if one.heldout else 'training'} problem of seed 0, index {one.index}, difficulty "
            f"{one.difficulty}")


def _check_again(task: Task, one: Drawn) -> None:
    """Raises UserError unless a problem is a function of its seed, index, difficulty and part."""
    if _draw(task, one.index, one.difficulty, one.heldout).cells != one.cells:
        raise UserError(f"task {task.name}, {_place(one)}: make returns another problem on a second call, so models "
                        f"would not be tested on the same ones; draw from rng alone, and keep no state between calls")


def _check_kept(task: Task, one: Drawn) -> None:
    """Raises UserError if making later problems has changed this one."""
    if _cells(one.problem) != one.cells:
        raise UserError(f"task {task.name}, {_place(one)}: its cells have changed since, because make writes into "
                        f"arrays that it has returned before; give each problem its own arrays")


def _check_answers_hidden(task: Task, drawn: Sequence[Drawn]) -> None:
    """Raises UserError if inputs contain every answer. At a single level they may: the prefix sum of one bit is it."""
    if all((one.problem.inputs == one.problem.targets)[one.problem.scored].all() for one in drawn):
        raise UserError(f"task {task.name}: in each of {len(drawn)} problems (the first: {_place(drawn[0])}) inputs "
                        f"holds the answer in every scored cell; put the blank, token 0, in the cells to predict")


def _check_drawn(task: Task, drawn: Sequence[Drawn], hardest: int) -> None:
    """Raises UserError if the index changes no problem of any level, as with draws from a generator that `make` seeds
    by the difficulty. An easy level may have a single problem, and so may each part of a file of two puzzles."""
    if task.one_per_difficulty:
        return
    parts: dict[tuple[int, bool], set[tuple[bytes, ...]]] = {}
    for one in drawn:
        parts.setdefault((one.difficulty, one.heldout), set()).add(one.cells)
    if any(len(problems) > 1 for problems in parts.values()):
        return
    train, heldout = ((hardest, part) for part in (False, True))
    if parts[train] != parts[heldout] and len(set.union(*parts.values())) == 2:
        return
    more = {_draw(task, index, *train).cells for index in range(PROBLEMS, PROBLEMS + MORE)}
    if more != parts[train]:
        return
    also = "and held-out ones repeat it" if parts[train] == parts[heldout] else "and so are all held-out ones"
    raise UserError(f"task {task.name}: all of {PROBLEMS + MORE} training problems of difficulty {hardest} are the "
                    f"same, {also}; draw the problem from the rng given to make, or set one_per_difficulty = True in "
                    f"the class if a difficulty has no other")


def _check_layout(task: Task, drawn: Sequence[Drawn]) -> None:
    """Raises UserError if `coordinates` or `shape` do not match the number of cells."""
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
    """Raises UserError if the first cell is scored, since no row predicts the first token of a text."""
    for one in drawn:
        if one.problem.scored[0]:
            raise UserError(f"task {task.name}, {_place(one)}: its first cell is scored, but under task.layout causal "
                            f"no cell before it predicts it; put a given cell there, or set task.layout to full")


def _check_scorer(task: Task, drawn: Sequence[Drawn]) -> None:
    """Raises UserError unless `is_right` accepts the reference answers and rejects some other one (not all need to be
    wrong)."""
    refused = False
    for one in drawn:
        with located(task, 0, one.index, one.difficulty, one.heldout):
            if not task.solved_by(one.problem, one.problem.targets.copy()):
                raise UserError(f"task {task.name}, {_place(one)}: is_right rejects targets, the problem's own "
                                f"answer; fix is_right or make")
            refused |= any(not task.solved_by(one.problem, wrong) for wrong in _others(task, one.problem))
    if not refused:
        raise UserError(f"task {task.name}: is_right accepts every answer, even if all scored cells differ from "
                        f"targets (tried on {len(drawn)}, the first: {_place(drawn[0])}); make it compare the scored "
                        f"cells of answer with the right ones")


def _others(task: Task, problem: Problem) -> list[Cells]:
    """The answer with its first scored cell changed, and with all scored cells changed."""
    first = np.flatnonzero(problem.scored)[:1]
    return [np.where(changed, (problem.targets + 1) % len(task.symbols), problem.targets)
            for changed in (np.isin(np.arange(len(problem)), first), problem.scored)]
