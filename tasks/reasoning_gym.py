"""Any dataset of the reasoning-gym package as a character-level task: `pip install 'looped[gym]'`.

A problem is the question, a separator, and the answer, padded with an end symbol to `answer_length`, so that the number
of blanks reveals nothing. The newline and each printable ASCII character have a symbol; all others share one.

The package's dataset is rebuilt for every problem, as some hold no more problems than their size: datasets that read
lists of words take tens of milliseconds, most of the others less than one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from looped.data.task import Problem, Task, blanks, register
from looped.errors import UserError, did_you_mean
from looped.tasks.puzzle_files import is_heldout

SEPARATOR, END, NEWLINE, OTHER = 1, 2, 3, 4  # after the blank
TRIES = 1000


@dataclass(frozen=True)
class GymProblem(Problem):
    """A problem, the package's own record of it, and the function that scores answers to it."""

    entry: Mapping[str, Any] = field(default_factory=dict)
    score: Callable[[str, Mapping[str, Any]], float] | None = None


@register
class ReasoningGym(Task):
    """dataset: its name in reasoning-gym. config: fields of its config. knob: the field set to the difficulty, or X for
    both min_X and max_X (`terms` for chain_sum); without it the difficulty is 1."""

    name = "reasoning-gym"
    source = "open-thought/reasoning-gym, its datasets and score_answer"
    difficulty = "none"
    trained = (1, 1)
    tested = (1,)
    symbols = ("▁", "→", "■", "↵", "□", *map(chr, range(32, 127)))
    causal = "next-token"

    def __init__(self, dataset: str = "chain_sum", config: Mapping[str, Any] | None = None, knob: str | None = None,
                 answer_length: int = 32) -> None:
        self.dataset, self.config, self.answer_length = dataset, dict(config or {}), answer_length
        self.knobs: list[str] = []
        for key in ("seed", "size"):
            if key in self.config:
                raise UserError(f"task.options.config sets {key}, which differs for each problem; leave it out")
        if knob is not None:
            fields = config_fields(dataset)
            self.knobs = [name for name in (knob, f"min_{knob}", f"max_{knob}") if name in fields]
            if not self.knobs:
                raise UserError(f"task.options.knob: {dataset} has no field '{knob}', nor min_{knob} and max_{knob}"
                                + did_you_mean(knob, fields))
            values = [self.config.get(name, fields[name]) for name in self.knobs]
            if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
                raise UserError(f"task.options.knob {knob} of {dataset} is {values}, not whole numbers; take another")
            self.difficulty = knob
            self.trained = (max(1, min(values)), max(1, *values))
            self.tested = tuple(sorted(set(self.trained)))

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        if not self.knobs and difficulty != 1:
            raise UserError(f"task.options.knob names no field that difficulty {difficulty} could set; give one, or "
                            "take difficulty 1")
        for _ in range(TRIES):
            drawn = draw_dataset(self.dataset, int(rng.integers(2**31)),
                                 {**self.config, **dict.fromkeys(self.knobs, difficulty)})
            entry = drawn[0]
            if not isinstance(entry["answer"], str):
                raise UserError(f"task.options.dataset {self.dataset} has problems without an answer to learn; take "
                                "another")
            question, answer = self.read(entry["question"]), self.read(entry["answer"])
            if is_heldout(np.array(question)) == heldout:
                break
        else:
            raise UserError(f"task.options.dataset {self.dataset} has too few questions of difficulty {difficulty} to "
                            "hold some out; take a higher one, or another config")
        if len(answer) >= self.answer_length:
            raise UserError(f"task.options.answer_length {self.answer_length} is too short for an answer of "
                            f"{len(answer)} characters and its end; take {len(answer) + 1} or more")
        answer += [END] * (self.answer_length - len(answer))
        problem = blanks([*question, SEPARATOR], answer)
        return GymProblem(problem.inputs, problem.targets, problem.scored, entry, drawn.score_answer)

    def is_right(self, problem: Problem, answer: np.ndarray) -> bool:
        """True if the text up to the first end symbol gets the package's full score, or is the answer itself."""
        if super().is_right(problem, answer):
            return True
        text = self.write(answer[problem.scored])
        if text is None or not isinstance(problem, GymProblem) or problem.score is None:
            return False
        try:
            return problem.score(text, problem.entry) == 1.0
        except Exception:  # some datasets fail on answers of another form
            return False

    def read(self, text: str) -> list[int]:
        """Text -> tokens."""
        known = {symbol: token for token, symbol in enumerate(self.symbols) if token > OTHER} | {"\n": NEWLINE}
        return [known.get(character, OTHER) for character in text]

    def write(self, tokens: np.ndarray) -> str | None:
        """Tokens -> the text before the first end symbol; None if some are not characters."""
        row = tokens.tolist()
        row = row[:row.index(END)] if END in row else row
        if not all(NEWLINE <= token < len(self.symbols) for token in row):
            return None
        return "".join("\n" if token == NEWLINE else self.symbols[token] for token in row)


# ---- the package -----------------------------------------------------------------------------------------------------

def _package() -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError as error:
        raise UserError(f"task reasoning-gym needs a package that is missing ({error}); pip install 'looped[gym]'"
                        ) from None
    return reasoning_gym


def config_fields(dataset: str) -> dict[str, Any]:
    """The fields of a dataset's config and their defaults. Raises UserError for an unknown dataset."""
    known = _package().factory.DATASETS
    if dataset not in known:
        raise UserError(f"task.options.dataset: reasoning-gym has no '{dataset}'{did_you_mean(dataset, known)}")
    return {one.name: one.default for one in dataclasses.fields(known[dataset][1])}


def draw_dataset(dataset: str, seed: int, config: Mapping[str, Any]) -> Any:
    """A dataset of the package with one problem."""
    fields = config_fields(dataset)
    for key in config:
        if key not in fields:
            raise UserError(f"task.options.config: {dataset} has no field '{key}'{did_you_mean(key, fields)}")
    try:
        return _package().create_dataset(dataset, seed=seed, size=1, **config)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"task.options.config {dict(config)} does not fit {dataset}: "
                        f"{str(error).partition(chr(10))[0]}") from None
