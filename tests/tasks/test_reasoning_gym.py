"""Datasets of reasoning-gym as tasks; with the package where it is installed, else with a small one in its place."""

import importlib.util
import random
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from looped.data.task import find_task
from looped.errors import UserError
from looped.tasks.puzzle_files import is_heldout

INSTALLED = importlib.util.find_spec("reasoning_gym") is not None


@dataclass
class SumConfig:
    min_terms: int = 2
    max_terms: int = 6
    min_digits: int = 1
    max_digits: int = 4
    allow_negation: bool = False
    seed: int | None = None
    size: int = 500


class Sums:
    def __init__(self, config):
        assert config.max_terms >= config.min_terms, "max_terms must be >= min_terms"
        self.config = config

    def __getitem__(self, index):
        rng = random.Random(self.config.seed + index)
        numbers = [rng.randrange(10) for _ in range(rng.randint(self.config.min_terms, self.config.max_terms))]
        return {"question": " + ".join(map(str, numbers)) + " =", "answer": str(sum(numbers)), "metadata": {}}

    def score_answer(self, answer, entry):
        return float(answer.strip() == entry["answer"])


@pytest.fixture(autouse=True)
def package(monkeypatch):
    if not INSTALLED:
        factory = SimpleNamespace(DATASETS={"chain_sum": (Sums, SumConfig)})
        fake = SimpleNamespace(factory=factory, create_dataset=lambda name, **config: Sums(SumConfig(**config)))
        monkeypatch.setitem(sys.modules, "reasoning_gym", fake)
        monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


def text(task, cells):
    return "".join(task.symbols[token] for token in cells)


def test_a_problem_is_question_separator_answer_and_end():
    task = find_task("reasoning-gym", {"knob": "terms", "answer_length": 12})
    problem = task.problem(0, 0, 3)
    question, _, answer = text(task, problem.targets).partition("→")
    assert question.count("+") + question.count("-") == 2
    assert eval(question.rpartition(":")[2].rstrip("= ")) == int(answer.rstrip("■"))
    assert len(answer) == 12 == problem.scored.sum()
    assert text(task, problem.inputs).endswith("→" + "▁" * 12)


def test_the_knob_sets_both_ends_and_its_defaults_are_the_range():
    task = find_task("reasoning-gym", {"knob": "terms"})
    assert (task.trained, task.tested, task.difficulty) == ((2, 6), (2, 6), "terms")
    for level in (2, 5, 9):
        question = text(task, task.problem(0, 1, level).inputs)
        assert question.count(" + ") + question.count(" - ") == level - 1


def test_problems_are_functions_of_seed_and_index_and_held_out_ones_are_others():
    task = find_task("reasoning-gym", {"knob": "terms"})
    again = find_task("reasoning-gym", {"knob": "terms"})
    for index, heldout in ((0, False), (1, False), (0, True)):
        one, two = (each.problem(3, index, 2, heldout=heldout) for each in (task, again))
        assert (one.targets == two.targets).all()
        assert is_heldout(one.inputs[~one.scored][:-1]) == heldout


def test_the_package_scores_and_wrong_answers_are_wrong():
    task = find_task("reasoning-gym", {"knob": "terms"})
    problem = task.problem(0, 0, 4)
    assert task.is_right(problem, problem.targets)
    broken = problem.targets.copy()
    first = int(np.flatnonzero(problem.scored)[0])
    for token in range(len(task.symbols) + 1):
        broken[first] = token
        assert task.is_right(problem, broken) == (token == problem.targets[first])
    garbage = problem.targets.copy()
    garbage[-1] = task.tokens("7")[0]  # behind the end, where nothing is read
    assert task.is_right(problem, garbage)


@pytest.mark.skipif(INSTALLED, reason="the small package takes answers with spaces around them")
def test_what_the_package_calls_right_is_right_though_it_is_not_the_target():
    task = find_task("reasoning-gym")
    problem = task.problem(0, 0, 1)
    spaced = problem.targets.copy()
    answer = spaced[problem.scored]
    spaced[problem.scored] = np.concatenate([task.tokens(" "), answer[:-1]])
    assert task.is_right(problem, spaced)


def test_newlines_have_a_symbol_and_characters_beyond_ascii_share_one():
    task = find_task("reasoning-gym")
    tokens = task.read("a\nb❌✅")
    assert text(task, tokens) == "a↵b□□"
    assert task.write(np.array(tokens[:3])) == "a\nb"


@pytest.mark.parametrize(("options", "level", "why"), [
    ({"dataset": "chain_smu"}, 1, "no 'chain_smu'; did you mean 'chain_sum'"),
    ({"config": {"min_term": 3}}, 1, "no field 'min_term'; did you mean 'min_terms'"),
    ({"config": {"min_terms": 5, "max_terms": 2}}, 1, "does not fit chain_sum: max_terms must be"),
    ({"config": {"seed": 3}}, 1, "sets seed"),
    ({"knob": "term"}, 1, "no field 'term'"),
    ({"knob": "allow_negation"}, 1, "not whole numbers"),
    ({}, 2, "give one, or take difficulty 1"),
    ({"answer_length": 1}, 1, "answer_length 1 is too short .* take"),
])
def test_a_bad_setting_is_named_in_one_sentence(options, level, why):
    with pytest.raises(UserError, match=why) as error:
        find_task("reasoning-gym", options).problem(0, 0, level)
    assert "\n" not in str(error.value)


def test_without_the_package_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install 'looped\[gym\]'"):
        find_task("reasoning-gym").problem(0, 0, 1)
