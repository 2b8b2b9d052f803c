"""Tasks as such: found by name or dotted path, drawn by number, shown, and written by a user in ten lines."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from looped.cli import main
from looped.data.task import BLANK, Problem, Task, blanks, find_task, next_token, register, rng_of, task_names
from looped.errors import UserError


class Largest(Task):
    """A user's task, not registered: which of n digits is the largest. Every cell but the last is given."""

    name = "largest"
    source = "here"
    difficulty = "digits"
    easiest = 2
    trained = (2, 4)
    tested = (4, 8)
    symbols = (".", *"0123456789")
    causal = "next-token"

    def __init__(self, *, up_to: int = 9) -> None:
        self.up_to = up_to

    def make(self, rng, difficulty, *, heldout):
        digits = rng.integers(0, self.up_to + 1, difficulty)
        return blanks(1 + digits, [1 + digits.max()])


class Grid(Task):
    """A square of two words, for what a picture needs."""

    name = "grid"
    symbols = (".", "wall", "way")

    def shape(self, length):
        side = int(length**0.5)
        return side, side

    def coordinates(self, length):
        return np.stack(np.divmod(np.arange(length), self.shape(length)[1]), axis=1)


class Needy(Largest):
    def __init__(self, *, what: int) -> None:
        self.what = what


MINE = f"{__name__}.Largest"
SMOKE = Path(__file__).parents[2] / "configs/smoke.yaml"


# ---- finding them ----------------------------------------------------------------------------------------------------


def test_every_task_is_found_by_its_name_and_says_what_it_is():
    names = task_names()
    assert names == sorted(set(names))
    assert {"prefix-sums", "parity", "copy", "addition", "nary-addition", "p-hop", "s5", "a5"} <= set(names)
    for name in names:
        task = find_task(name)
        assert task.name == name
        assert inspect.getdoc(type(task)) != inspect.getdoc(Task)
        assert all(isinstance(text, str) and text for text in (task.source, task.difficulty))
        first, last = task.trained
        assert task.easiest <= first <= last <= max(task.tested)


def test_a_class_of_ones_own_is_found_by_its_dotted_path():
    task = find_task(MINE, {"up_to": 3})
    assert isinstance(task, Largest)
    assert "largest" not in task_names()
    problem = task.problem(0, 0, 8)
    assert len(problem) == 9
    assert problem.targets[-1] == problem.inputs[:-1].max() <= 4


MODULE = """
from looped.data.task import blanks
from tests_of_a_user import Base

class Rev(Base):
    def make(self, rng, difficulty, *, heldout):
        import late_neighbour
        return late_neighbour.reversed_digits(rng, difficulty)
"""
NEIGHBOUR = """
from looped.data.task import Task

class Base(Task):
    name, difficulty, trained, tested, symbols = "rev", "digits", (2, 3), (3,), (".", *"0123456789")
"""
LATE = """
from looped.data.task import blanks

def reversed_digits(rng, difficulty):
    digits = 1 + rng.integers(0, 10, difficulty)
    return blanks(digits, digits[::-1])
"""


@pytest.fixture
def project(tmp_path):
    """A user's folder: a package with a task, which imports its neighbours, one of them late."""
    (tmp_path / "mine").mkdir()
    for name, text in {"mine/__init__.py": "", "mine/tasks.py": MODULE, "tests_of_a_user.py": NEIGHBOUR,
                       "late_neighbour.py": LATE, "json.py": "raise RuntimeError('shadowed')",
                       "broken.py": "def"}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


SCRIPT = "import sys; sys.path = [p for p in sys.path if p]; from looped.cli import main; sys.exit(main(sys.argv[1:]))"
"""The console script, whose folder is on the path instead of the current one."""


def command(task):
    return ["train", str(SMOKE), "--dry-run", "--task.name", task, "--denoise.context", "inject"]


def test_the_command_finds_a_task_in_the_current_folder(project):
    done = subprocess.run([sys.executable, "-P", "-c", SCRIPT, *command("mine.tasks.Rev")], cwd=project,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout


@pytest.mark.parametrize(("folder", "task", "why"), [
    ("..", "mine.tasks.Rev", "No module named 'mine' (looked in {}, then among the installed"),
    (".", "broken.Rev", "broken.Rev cannot be imported: SyntaxError: invalid syntax (broken.py, line 1)")])
def test_what_is_not_there_or_cannot_be_read_ends_in_one_sentence(project, folder, task, why, monkeypatch, capsys):
    monkeypatch.chdir(project / folder)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.delitem(sys.modules, "mine.tasks", raising=False)
    assert main(command(task)) == 2
    said = capsys.readouterr().err
    assert why.format(Path.cwd()) in said
    assert said.count("\n") == 1


def test_the_current_folder_hides_no_installed_module_once_the_task_is_found(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    task = find_task("mine.tasks.Rev")
    assert task.problem(0, 0, 3).scored.sum() == 3  # imports late_neighbour
    assert sys.path[-1] == str(project)
    monkeypatch.delitem(sys.modules, "json")
    assert "shadowed" not in importlib.import_module("json").__doc__
    before = list(sys.path)
    with pytest.raises(UserError, match="cannot be imported"):
        find_task("mine.tasks.Nothing")
    assert sys.path == before


def test_a_registered_class_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr("looped.data.task._REGISTERED", {})  # put back afterwards
    register(Largest)
    assert isinstance(find_task("largest"), Largest)


@pytest.mark.parametrize(("name", "options", "why"), [
    ("partiy", {}, "unknown task 'partiy'; did you mean 'parity'"),
    ("zzzzzz", {}, "unknown task 'zzzzzz'; known names: .*addition.*prefix-sums"),
    ("no_such_module.Task", {}, "no_such_module.Task cannot be imported: No module.*; give the dotted path of a class"),
    (f"{__name__}.Smallest", {}, "Smallest cannot be imported.*; give the dotted path of a class"),
    (f"{__name__}.MINE", {}, "MINE is not a task; give the dotted path of a subclass"),
    ("looped.errors", {}, "looped.errors is not a task"),
    ("pathlib.Path", {}, "pathlib.Path is not a task"),
    ("prefix-sums", {"bits": 3}, "prefix-sums has no option 'bits'; it takes none"),
    (MINE, {"upto": 3}, "has no option 'upto'; did you mean 'up_to'"),
    (f"{__name__}.Needy", {}, "task.options do not fit .*Needy: .*'what'; its options are what"),
])
def test_a_task_that_is_not_found_is_named_in_one_sentence(name, options, why):
    with pytest.raises(UserError, match=why) as error:
        find_task(name, options)
    assert "\n" not in str(error.value)


def test_tasks_load_no_torch():
    code = "import sys, looped.data.task as t; t.task_names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- drawing problems ------------------------------------------------------------------------------------------------


def test_a_generator_is_a_function_of_its_whole_key():
    def draws(*key):
        return tuple(rng_of(*key).integers(0, 2**60, 3))

    assert draws("a", 1, False) == draws("a", 1, False)
    keys = [("a", 1), ("a", 2), ("b", 1), ("a1",), (1, "a"), ("a", 1, 0), ("a", "1"), ("a", True), ("a", -1), ()]
    assert len({draws(*key) for key in keys}) == len(keys)


def test_the_generator_is_the_same_on_every_machine():
    assert rng_of("parity", 0, 1, 2, False).integers(0, 1000, 4).tolist() == [822, 454, 292, 462]


def test_a_difficulty_below_the_easiest_is_refused():
    with pytest.raises(UserError, match=r"largest begins at difficulty 2 \(digits\), got 1"):
        Largest().problem(0, 0, 1)


def test_every_level_beyond_the_trained_can_be_drawn():
    assert len(Largest().problem(0, 0, 1000)) == 1001


# ---- problems --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_blanks_stand_where_the_answer_is_sought(kind):
    problem = blanks(kind([3, 4, 5]), kind([6, 7]))
    assert problem.inputs.tolist() == [3, 4, 5, BLANK, BLANK]
    assert problem.targets.tolist() == [3, 4, 5, 6, 7]
    assert problem.scored.tolist() == [False, False, False, True, True]
    assert problem.inputs.dtype == problem.targets.dtype == np.int64


def test_next_token_asks_for_the_answer_from_the_last_given_cell_on():
    """A causal model gives the first answer token while it reads the last of the question, and sees no blank."""
    problem = next_token(blanks([3, 4, 5], [6, 7]))
    assert problem.inputs.tolist() == [3, 4, 5, 6]
    assert problem.targets.tolist() == [4, 5, 6, 7]
    assert problem.scored.tolist() == [False, False, True, True]
    assert len(problem) == 4


def test_only_scored_cells_decide_whether_an_answer_is_right():
    task, problem = Largest(), blanks([3, 4, 5], [6, 7])
    assert task.is_right(problem, np.array([0, 0, 0, 6, 7]))
    assert not task.is_right(problem, np.array([3, 4, 5, 6, 8]))
    assert not task.is_right(problem, np.array([3, 4, 5, 1, 7]))


def test_inputs_given_are_not_changed():
    given, answer = np.array([3, 4]), np.array([5])
    blanks(given, answer).inputs[:] = 9
    assert (given.tolist(), answer.tolist()) == ([3, 4], [5])


# ---- showing them ----------------------------------------------------------------------------------------------------


def test_cells_are_shown_as_symbols_and_read_back():
    task = Largest()
    problem = task.problem(0, 0, 4)
    text = task.show(problem.inputs)
    assert text.endswith(".")
    assert task.tokens(text).tolist() == problem.inputs.tolist()
    assert task.show(task.tokens("907")) == "907"
    assert task.shape(3) == (1, 3)
    assert task.coordinates(3).tolist() == [[0], [1], [2]]


def test_a_grid_is_shown_in_lines_and_long_symbols_apart():
    task = Grid()
    cells = task.tokens(["wall", "way", ".", "way"])
    assert cells.tolist() == [1, 2, 0, 2]
    assert task.show(cells) == "wall way\n. way"
    assert task.coordinates(4).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_a_task_without_make_says_so():
    with pytest.raises(NotImplementedError):
        Grid().problem(0, 0, 1)


def test_a_problem_cannot_be_changed_by_accident():
    problem = blanks([1], [2])
    with pytest.raises(AttributeError):
        problem.inputs = problem.targets
    assert isinstance(problem, Problem)
