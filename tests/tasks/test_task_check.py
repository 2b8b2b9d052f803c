"""A task of one's own with a fault is refused when it is opened, in one sentence that names the problem."""

import re
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from puzzle_helpers import as_text, write_csv

from looped.cli import main
from looped.config.data import TaskConfig
from looped.data.task import Malformed, Problem, Task, blanks, find_task, task_names
from looped.data.task_data import prepare_task
from looped.errors import UserError

CALLS, BUFFER = count(), np.zeros(40, dtype=np.int64)
LEGACY = np.random.RandomState(0)
"""As `np.random` itself, whose state goes on from call to call."""


class Reverse(Task):
    """Digits, and blanks where they are asked backwards: as it should be."""

    name = "reverse"
    difficulty = "digits"
    trained = (2, 4)
    tested = (4, 6)
    symbols = (".", *"0123456789")
    causal = "next-token"

    def make(self, rng, difficulty, *, heldout):
        digits = 1 + rng.integers(0, 10, difficulty)
        return blanks(digits, digits[::-1])


def changed(**fields):
    """A task whose problems have some of their fields changed by functions of the problem."""
    class Changed(Reverse):
        def make(self, rng, difficulty, *, heldout):
            problem = super().make(rng, difficulty, heldout=heldout)
            cells = {name: getattr(problem, name) for name in ("inputs", "targets", "scored")}
            return Problem(**cells | {name: change(problem) for name, change in fields.items()})

    return Changed


def made(returned):
    class Made(Reverse):
        def make(self, rng, difficulty, *, heldout):
            return returned(super().make(rng, difficulty, heldout=heldout), heldout)

    return Made


def judged(right):
    class Judged(Reverse):
        def is_right(self, problem, answer):
            return right(problem, answer)

    return Judged


def declared(**attributes):
    return type("Declared", (Reverse,), attributes)


def without(attribute):
    return type("Partial", (Task,), {name: value for name, value in vars(Reverse).items()
                                     if name != attribute and not name.startswith("__")})


def nested(self, rng, difficulty, *, heldout):
    return [][difficulty]


def reseeded(seed_of):
    """Reverse with draws from a generator that `make` seeds by (rng, difficulty, heldout)."""
    class Reseeded(Reverse):
        def make(self, rng, difficulty, *, heldout):
            own = np.random.default_rng(seed_of(rng, difficulty, heldout))
            return super().make(own, difficulty, heldout=heldout)

    return Reseeded


def drawn_among(num, **attributes):
    """Every level has `num` problems."""
    class Few(Reverse):
        def make(self, rng, difficulty, *, heldout):
            return super().make(np.random.default_rng(rng.integers(num)), difficulty, heldout=heldout)

    return type("Few", (Few,), attributes)


def token(value):
    return lambda problem: np.where(problem.scored, value, problem.targets)


def refilled(problem, heldout):
    view = BUFFER[: len(problem)]
    view[:] = problem.inputs
    return Problem(view, problem.targets, problem.scored)


WHERE = "training problem of seed 0, index 0, difficulty 2"
FAULTS = {
    # what is wrong: the task, what the sentence says
    "0 and 1 as scored": (changed(scored=lambda p: p.scored.astype(int)),
                          f"{WHERE}: scored holds int64, not bool; give scored.astype(bool)"),
    "cell numbers as scored": (changed(scored=lambda p: np.flatnonzero(p.scored)), f"{WHERE}: scored holds int64"),
    "no cell scored": (changed(scored=lambda p: p.scored & False), f"{WHERE}: no cell is scored"),
    "float cells": (changed(inputs=lambda p: p.inputs / 1),
                    f"{WHERE}: inputs holds float64, not int64; give inputs.astype(np.int64)"),
    "small integers": (changed(targets=lambda p: p.targets.astype(np.uint8)), f"{WHERE}: targets holds uint8"),
    "lists": (changed(targets=lambda p: p.targets.tolist()),
              f"{WHERE}: targets is of type list, not a numpy array; give np.array(..., dtype=np.int64)"),
    "a grid": (changed(inputs=lambda p: p.inputs[None]), f"{WHERE}: inputs has shape (1, 4)"),
    "short targets": (changed(targets=lambda p: p.targets[:-1]), f"{WHERE}: inputs has 4 cells, targets has 3 cells"),
    "short scored": (changed(scored=lambda p: p.scored[1:]), "scored has 3 cells; give all three the same length"),
    "a negative token": (changed(targets=token(-1)),
                         f"{WHERE}: targets has token -1 in cell 2, but symbols has tokens 0 to 10"),
    "a token too large": (changed(targets=token(11)), f"{WHERE}: targets has token 11 in cell 2"),
    "targets without the question": (changed(targets=lambda p: p.targets * p.scored), f"{WHERE}: cell 0 is given"),
    "a tuple": (made(lambda problem, heldout: (problem.inputs, problem.targets, problem.scored)),
                f"{WHERE}: make returns tuple, not a problem; return Problem(inputs, targets, scored)"),
    "nothing": (made(lambda problem, heldout: None), f"{WHERE}: make returns NoneType"),
    "np.random": (made(lambda problem, heldout: blanks([1, 2], LEGACY.randint(1, 10, 2))),
                  "make returns another problem on a second call"),
    "np.random where held out": (made(lambda p, heldout: blanks([1], LEGACY.randint(1, 10, 8)) if heldout else p),
                                 "held-out problem of seed 0, index 0, difficulty 4: make returns another"),
    "a generator seeded by the difficulty": (
        reseeded(lambda rng, difficulty, heldout: difficulty),
        "all of 36 training problems of difficulty 4 are the same, and held-out ones repeat it; draw the problem from "
        "the rng given to make"),
    "a generator with a fixed seed": (reseeded(lambda rng, difficulty, heldout: 0), "held-out ones repeat it"),
    "a generator seeded by difficulty and part": (
        reseeded(lambda rng, difficulty, heldout: [difficulty, heldout]),
        "training problems of difficulty 4 are the same, and so are all held-out ones"),
    "a counter": (made(lambda problem, heldout: blanks([1, 1 + next(CALLS) % 10], [3, 4])), "make returns another"),
    "one array for all": (made(refilled), "its cells have changed since"),
    "answers given": (changed(inputs=lambda p: p.targets),
                      "inputs holds the answer in every scored cell; put the blank"),
    "a scorer that returns an array": (judged(lambda p, answer: answer == p.targets),
                                       "is_right returns ndarray of shape (4,), not True or False"),
    "a scorer that returns a share": (judged(lambda p, answer: (answer == p.targets).mean()),
                                      "is_right returns float64, not"),
    "a scorer that takes everything": (judged(lambda p, answer: True),
                                       "is_right accepts every answer"),
    "a scorer that refuses the reference": (judged(lambda p, answer: False),
                                            f"{WHERE}: is_right rejects targets, the problem's own answer"),
    "a scorer that raises": (judged(lambda p, answer: 1 / 0), f"{WHERE}: ZeroDivisionError in <lambda> ("),
    "make that raises": (declared(make=nested), f"{WHERE}: IndexError in nested ("),
    "make without heldout": (declared(make=lambda self, rng, difficulty: None),
                             "make cannot be called as make(rng, difficulty, heldout=...): got an unexpected keyword"),
    "no make": (without("make"), "task reverse has no make"),
    "no name": (without("name"), "task Partial has no attribute name; give the class name = ..., a word"),
    "no difficulty": (without("difficulty"), "has no attribute difficulty"),
    "no trained": (without("trained"), "has no attribute trained"),
    "no tested": (without("tested"), "has no attribute tested"),
    "no symbols": (without("symbols"), "has no attribute symbols; give the class symbols = ..., two or more"),
    "a symbol twice": (declared(symbols=(".", "1", "1")),
                       "has symbols ('.', '1', '1'); make it two or more different strings"),
    "trained downwards": (declared(trained=(4, 2)), "has trained (4, 2); make it (lowest, highest) difficulty"),
    "a negative one tested": (declared(tested=(4, -1)), "has tested (4, -1); make it difficulties from easiest"),
    "tested too easy": (declared(tested=(0, 4)), "tests difficulty 0, below its easiest, 1"),
    "an order that is none": (declared(causal=True), "has causal True; make it 'aligned', 'next-token' or None"),
    "short coordinates": (declared(coordinates=lambda self, length: np.arange(length)),
                          "coordinates(4) gives int64 of shape (4,); return an int64 array of shape (4, axes)"),
    "float coordinates": (declared(coordinates=lambda self, length: np.ones((length, 1))),
                          "coordinates(4) gives float64"),
    "one problem or not": (declared(one_per_difficulty=1), "has one_per_difficulty 1; make it True or False"),
    "another shape": (declared(shape=lambda self, length: (2, length)),
                      "shape(4) gives (2, 4); return (rows, columns)"),
}


def opened(monkeypatch, task, **settings):
    """The data of a task, which its dotted path finds as a user's would."""
    monkeypatch.setitem(globals(), "Sought", task)
    return prepare_task(TaskConfig(name=f"{__name__}.Sought", **settings))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_task_is_refused_when_it_is_opened(monkeypatch, unchecked, fault):
    task, says = FAULTS[fault]
    with pytest.raises(UserError) as caught:
        opened(monkeypatch, task)
    message = str(caught.value)
    assert says in message
    assert message.startswith("task ")
    assert "\n" not in message
    assert len(message) < 400


def test_the_sentences_of_the_guide_are_those_that_are_said(monkeypatch, unchecked):
    said = []
    for task, _ in FAULTS.values():
        with pytest.raises(UserError) as caught:
            opened(monkeypatch, task)
        said.append(str(caught.value))
    page = (Path(__file__).parents[2] / "docs" / "own-tasks.md").read_text(encoding="utf-8")
    table, = re.findall(r"\| fault \|.*\n\|---\|---\|\n((?:\|.*\n)+)", page)
    sentences = re.findall(r"`([^`]+)` \|$", table, flags=re.MULTILINE)
    assert len(sentences) == table.count("\n")
    assert [sentence for sentence in sentences if not any(each.endswith(sentence) for each in said)] == []


def test_the_same_task_without_a_fault_is_opened(monkeypatch):
    assert opened(monkeypatch, Reverse).train.batch(0, batch_size=1, seed=0).scored.any()


@pytest.mark.parametrize("right", [np.bool_, bool])
def test_numpy_truth_values_are_truth_values(monkeypatch, right):
    task = judged(lambda problem, answer: right((answer == problem.targets)[problem.scored].all()))
    assert opened(monkeypatch, task).task.solved_by(blanks([1], [2]), np.array([1, 2])) is True


def test_a_fault_of_a_later_problem_names_it(monkeypatch):
    """The few problems of the start cannot show all."""
    task = made(lambda problem, heldout: blanks([1, 2], [11]) if (problem.inputs[:2] == 5).all() else problem)
    data = opened(monkeypatch, task)
    with pytest.raises(UserError, match=r"training problem of seed 0, index \d+, difficulty \d: targets has token 11"):
        data.train.batch(0, batch_size=800, seed=0)


def test_a_task_whose_easiest_level_shows_its_answers_is_opened():
    """The first running sum is the first bit: at that level alone nothing is hidden, beyond it something is."""
    problem = find_task("prefix-sums").problem(0, 0, 1)
    assert (problem.inputs == problem.targets).all()
    assert prepare_task(TaskConfig(name="prefix-sums", difficulty=(1, 1))).train.high == 1


def test_a_generator_seeded_by_the_rng_is_accepted(monkeypatch):
    task = reseeded(lambda rng, difficulty, heldout: int(rng.integers(2**31)))
    assert opened(monkeypatch, task).task.tested == (4, 6)


@pytest.mark.parametrize("levels", [{}, {"trained": (4, 4), "tested": (4,)}])
def test_two_problems_per_level_are_enough_whatever_the_first_draws_are(monkeypatch, levels):
    monkeypatch.setattr("looped.data.task_check.PROBLEMS", 1)
    assert opened(monkeypatch, drawn_among(2, **levels)).train.high == 4
    with pytest.raises(UserError, match="all of 33 training problems of difficulty 4 are the same"):
        opened(monkeypatch, drawn_among(1, **levels))


def test_a_single_problem_per_level_is_accepted_where_the_class_says_so(monkeypatch):
    assert opened(monkeypatch, drawn_among(1, one_per_difficulty=True)).train.high == 4


def test_a_single_problem_at_the_easiest_level_is_accepted(monkeypatch):
    task = declared(make=lambda self, rng, difficulty, heldout: (
        blanks([1], [1]) if difficulty == 1 else Reverse.make(self, rng, difficulty, heldout=heldout)))
    assert opened(monkeypatch, task, difficulty=(1, 2)).train.low == 1
    assert opened(monkeypatch, task, difficulty=(1, 1)).train.high == 1


def test_a_file_of_one_training_and_one_heldout_puzzle_passes(tmp_path):
    task = find_task("sudoku")
    path = write_csv(tmp_path / "puzzles.csv", [as_text(task, task.problem(0, index, 9)) for index in range(2)])
    data = prepare_task(TaskConfig(name="sudoku", options={"path": path}))
    assert (data.heldout(1, 9)[0].inputs != data.train.batch(0, batch_size=1, seed=0).inputs[0].numpy()).any()


def test_a_first_cell_that_is_asked_is_refused_from_left_to_right_alone(monkeypatch):
    task = changed(inputs=lambda p: p.inputs * 0, scored=lambda p: p.scored | True)
    assert opened(monkeypatch, task, layout="full").train.batch(0, batch_size=1, seed=0).scored[0, 0]
    with pytest.raises(UserError, match=r"its first cell is scored, but under task\.layout causal no cell"):
        opened(monkeypatch, task, layout="causal")


def test_malformed_cells_are_refused_without_a_task_too():
    with pytest.raises(Malformed, match="scored holds int64, not bool"):
        Problem(np.array([0, 0]), np.array([1, 2]), np.array([1, 1]))


@pytest.mark.parametrize("layout", ["full", "causal"])
def test_every_shipped_task_passes(layout):
    for name in task_names():
        if name == "reasoning-gym" or (layout == "causal" and find_task(name).causal is None):
            continue
        assert prepare_task(TaskConfig(name=name, layout=layout)).task.name == name


@pytest.mark.parametrize(("name", "level"), [("sudoku", 9), ("maze", 9)])
def test_puzzles_of_a_file_pass(tmp_path, name, level):
    task = find_task(name)
    rows = [as_text(task, task.problem(0, index, level)) for index in range(20)]
    path = write_csv(tmp_path / "puzzles.csv", rows)
    assert prepare_task(TaskConfig(name=name, options={"path": path})).train.high == level


def test_reasoning_gym_passes():
    pytest.importorskip("reasoning_gym")
    assert prepare_task(TaskConfig(name="reasoning-gym", layout="causal")).vocab_size > 90


def test_the_command_says_it_in_one_line_and_writes_no_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(globals(), "Sought", FAULTS["0 and 1 as scored"][0])
    code = main(["train", "configs/smoke.yaml", "--run", str(tmp_path / "run"), "--task.name", f"{__name__}.Sought",
                 "--denoise.context", "inject"])
    said = capsys.readouterr()
    assert code == 2
    assert said.err.startswith("looped: task reverse, training problem of seed 0, index 0, difficulty 2: scored holds")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("name", "expected"), [("prefix-sums", "8941a0d3f391a97236ee5e9380685456"),
                                                ("sudoku", "7838b6854236651e7e2802977fb74c8e")])
def test_the_fingerprint_of_runs_from_before_the_check_is_kept(name, expected):
    assert prepare_task(TaskConfig(name=name)).fingerprint == expected
