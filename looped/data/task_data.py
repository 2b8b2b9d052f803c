"""The problems of a task as training data: each step's batch is a function of (seed, step), as with text."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from looped.config.data import TaskConfig
from looped.data.batch import Batch, collate
from looped.data.task import Problem, Task, find_task, rng_of
from looped.data.task_check import check_declared, check_problems
from looped.errors import UserError

HELDOUT_SEED = 0
"""The seed of all held-out problems."""
FINGERPRINTED = 4
"""Number of problems per trained level that enter the fingerprint of a task."""
MEASURED = 256
"""Number of held-out problems per level that enter the fingerprint of other puzzles."""


@dataclass(frozen=True)
class ProblemStream:
    """Endless stream of problems, numbered `step * batch_size + row`, with uniform difficulties from low to high, one
    for each problem, or without `per_problem` for each batch."""

    task: Task
    low: int
    high: int
    causal: bool
    window: int | None = None
    per_problem: bool = True

    def batch(self, step: int, *, batch_size: int, seed: int, rows: range | None = None) -> Batch:
        """The given rows (all by default) of the batch of an optimiser step, counted from 0."""
        indices = [step * batch_size + row for row in (rows if rows is not None else range(batch_size))]
        return self.collate([self.task.problem(seed, index, self.difficulty_of(seed, step, index))
                             for index in indices])

    def collate(self, problems: Sequence[Problem]) -> Batch:
        """A batch of any problems of the task, in the layout of the stream."""
        return collate(self.task, problems, causal=self.causal, window=self.window)

    def difficulty_of(self, seed: int, step: int, index: int) -> int:
        """The difficulty of the problem of this index, which is in the batch of this step."""
        if self.low == self.high:
            return self.low
        drawn = rng_of("difficulty", seed, index) if self.per_problem else rng_of("difficulty of a batch", seed, step)
        return int(drawn.integers(self.low, self.high + 1))

    def describe(self, step: int, *, batch_size: int, seed: int, rows: range) -> list[str]:
        """One line per row of a batch: its difficulty, index and seed."""
        return [f"row {row}: {self.task.name}, {self.task.difficulty} {self.difficulty_of(seed, step, index)}, problem "
                f"{index} of seed {seed}" for row in rows for index in [step * batch_size + row]]


@dataclass(frozen=True)
class TaskData:
    """The problems of a task; members in common with `TextData` have the same names. source: a phrase for where they
    come from; trained_on: the difficulties of the run that is measured on them, if it was trained on other problems."""

    task: Task
    train: ProblemStream
    fingerprint: str
    source: str | None = None
    trained_on: tuple[int, int] | None = None

    tokenizer = picture = end_of_text = None
    """No text: the symbols are the tokens."""

    @property
    def vocab_size(self) -> int:
        return len(self.task.symbols)

    @property
    def causal(self) -> bool:
        return self.train.causal

    @property
    def trained(self) -> tuple[int, int]:
        """The lowest and the highest difficulty in training."""
        return self.trained_on or (self.train.low, self.train.high)

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that identify the problems, by name."""
        return {"source": self.source or f"task {self.task.name}", "lowest difficulty": self.train.low,
                "highest difficulty": self.train.high, "causal": self.causal, "window": self.train.window,
                "symbols": self.vocab_size, "contents": self.fingerprint[:16]}

    @property
    def summary(self) -> str:
        """One line for logs."""
        return (f"{self.task.name}: {self.task.difficulty} {self.train.low} to {self.train.high}, "
                f"{'causal' if self.causal else 'all cells at once'}, {self.vocab_size} symbols")

    def heldout(self, num: int, difficulty: int) -> list[Problem]:
        """Held-out problems, the same on every call and for every training seed: `num`, or all if there are fewer."""
        return [self.task.problem(HELDOUT_SEED, index, difficulty, heldout=True)
                for index in range(self.num_heldout(num, difficulty))]

    def num_heldout(self, num: int, difficulty: int) -> int:
        """`num`, or the number of all held-out problems of a difficulty if that is less."""
        there_are = self.task.num_heldout(difficulty)
        return num if there_are is None else min(num, there_are)

    def collate(self, problems: Sequence[Problem]) -> Batch:
        return self.train.collate(problems)


def prepare_task(config: TaskConfig) -> TaskData:
    """The task of a config. Raises UserError for an unknown name, for options, difficulties or a layout that the task
    does not have, and for a task that fails the checks of `task_check`."""
    if config.name is None:
        raise UserError("task.name is not set; name a task, such as copy, or the dotted path of one")
    task = find_task(config.name, config.options)
    check_declared(task)
    low, high = trained_range(config, task)
    if low < task.easiest:
        raise UserError(f"task.difficulty {[low, high]} begins below {task.easiest}, the lowest difficulty of "
                        f"{task.name} ({task.difficulty}); raise it")
    if config.layout == "causal" and task.causal is None:
        raise UserError(f"task.layout causal does not fit {task.name}, whose cells depend on all others; "
                        f"set task.layout to full")
    stream = ProblemStream(task, low, high, config.layout == "causal", config.window, config.per_problem)
    check_problems(task, (low, high), causal=stream.causal)
    return TaskData(task, stream, _fingerprint(config, stream))


def puzzles_of_file(config: TaskConfig, path: str) -> TaskData:
    """The puzzles of a file, to measure a run of this task on: its held-out part, at every difficulty that the file
    has. Raises UserError for a task without files, and for a file that it does not accept."""
    trained = find_task(config.name, config.options)
    try:
        data = prepare_task(config.model_copy(update={"options": trained.options_for_file(path), "difficulty": None}))
    except UserError as error:
        raise UserError(str(error).replace("task.options.path", "--puzzles")) from None
    digest = hashlib.sha256(data.task.contents)
    problems = [problem for difficulty in data.task.tested for problem in data.heldout(MEASURED, difficulty)]
    for problem in problems:
        digest.update(problem.inputs.astype("<i8").tobytes() + problem.targets.astype("<i8").tobytes())
    if known := trained.num_trained_on(problems):
        warnings.warn(f"--puzzles {path}: the run was trained on {known} of the first {len(problems)} of its held-out "
                      f"puzzles, or on symmetric ones; leave them out to measure it on new ones", stacklevel=2)
    return replace(data, fingerprint=digest.hexdigest()[:32], source=f"{config.name} of {Path(path).name}",
                   trained_on=trained_range(config, trained))


def trained_range(config: TaskConfig, task: Task | None = None) -> tuple[int, int]:
    """(lowest, highest) difficulty in training: the config's, else the task's default."""
    if config.difficulty is not None:
        return config.difficulty
    low, high = (task or find_task(config.name, config.options)).trained
    return low, high


def _fingerprint(config: TaskConfig, stream: ProblemStream) -> str:
    settings = config.model_dump(mode="json", exclude={"per_problem"})  # which decides no problem
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(stream.task.contents)
    for difficulty in sorted({stream.low, stream.high}):
        for index in range(FINGERPRINTED):
            problem = stream.task.problem(0, index, difficulty)
            digest.update(problem.inputs.astype("<i8").tobytes() + problem.targets.astype("<i8").tobytes())
    return digest.hexdigest()[:32]
