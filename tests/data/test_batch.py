"""Problems become batches: any lengths, both layouts, the same for everybody who asks."""

import numpy as np
import pytest
import torch

from looped.config import load_config
from looped.data.batch import Batch, collate
from looped.data.task import BLANK, find_task
from looped.data.task_data import prepare_task
from looped.errors import UserError


def task_config(**settings):
    return load_config(None, {"task.name": "prefix-sums", "denoise.context": "inject"} | {
        f"task.{name}": value for name, value in settings.items()}).task


def test_plain_tokens_ask_for_each_token_from_those_before_it():
    tokens = torch.arange(12).view(2, 6)
    batch = Batch.of(tokens)
    assert torch.equal(batch.inputs, tokens[:, :-1])
    assert torch.equal(batch.targets, tokens[:, 1:])
    assert batch.causal
    assert batch.num_tokens == 10
    assert Batch.of(batch) is batch


def test_shorter_problems_are_filled_up_with_cells_that_count_for_nothing():
    task = find_task("prefix-sums")
    batch = collate(task, [task.problem(0, index, bits) for index, bits in enumerate((5, 3))], causal=False)
    assert batch.lengths.tolist() == [6, 4]  # with the start marker
    assert batch.inputs[1, 4:].tolist() == [BLANK, BLANK]
    assert batch.scored.sum(1).tolist() == [5, 3]
    assert batch.num_tokens == 10
    losses = torch.ones(2, 6)
    losses[1, 4:] = 100.0
    assert batch.mean(losses).tolist() == [1.0, 1.0]


def test_problems_of_one_length_need_no_filling_up():
    task = find_task("prefix-sums")
    assert collate(task, [task.problem(0, index, 4) for index in range(3)], causal=False).lengths is None


def test_a_question_and_its_answer_become_a_text_to_continue_in_the_causal_layout():
    task = find_task("addition")
    problem = task.problem(0, 0, 3)
    batch = collate(task, [problem], causal=True)
    assert batch.inputs[0].tolist() == problem.targets[:-1].tolist()
    assert batch.targets[0].tolist() == problem.targets[1:].tolist()
    asked = batch.targets[0][batch.scored[0]]
    assert asked.tolist() == problem.targets[problem.scored].tolist()
    assert BLANK not in batch.inputs


def test_cells_of_a_grid_know_their_row_column_and_box():
    task = find_task("sudoku", {"size": 4})
    batch = collate(task, [task.problem(0, 0, 10)], causal=False)
    assert batch.positions.shape == (1, 16, 3)
    assert batch.positions[0, 7].tolist() == [1, 3, 1]


def test_some_sequences_of_a_batch_and_several_copies_of_it():
    task = find_task("prefix-sums")
    batch = collate(task, [task.problem(0, index, 3 + index) for index in range(3)], causal=False)
    picked = batch[torch.tensor([2, 0])]
    assert picked.lengths.tolist() == [6, 4]
    assert torch.equal(picked.inputs, batch.inputs[[2, 0]])
    assert len(batch.repeat(2)) == 6
    assert batch.repeat(2).causal is False


@pytest.mark.parametrize("layout", ["full", "causal"])
def test_any_rows_of_a_step_are_those_of_the_whole_step(layout):
    stream = prepare_task(task_config(difficulty=[4, 4], layout=layout)).train
    whole = stream.batch(7, batch_size=6, seed=3)
    part = stream.batch(7, batch_size=6, seed=3, rows=range(2, 4))
    assert torch.equal(whole.inputs[2:4], part.inputs)
    assert torch.equal(whole.targets[2:4], part.targets)
    assert not torch.equal(whole.inputs, stream.batch(8, batch_size=6, seed=3).inputs)
    assert not torch.equal(whole.inputs, stream.batch(7, batch_size=6, seed=4).inputs)


def test_difficulties_are_drawn_evenly_from_the_range():
    stream = prepare_task(task_config(difficulty=[3, 6])).train
    counts = np.bincount([stream.difficulty_of(0, index // 8, index) for index in range(4000)], minlength=7)
    assert counts[:3].sum() == 0
    assert abs(counts[3:] - 1000).max() < 140  # five standard deviations
    assert "bits" in stream.describe(0, batch_size=4, seed=0, rows=range(1))[0]


def test_one_difficulty_for_a_batch_is_drawn_evenly_and_leaves_nothing_to_pad():
    stream = prepare_task(task_config(difficulty=[3, 6], per_problem=False)).train
    counts = np.bincount([stream.difficulty_of(0, step, step * 8) for step in range(4000)], minlength=7)
    assert counts[:3].sum() == 0
    assert abs(counts[3:] - 1000).max() < 140
    for step in range(6):
        whole = stream.batch(step, batch_size=8, seed=0)
        assert len({line.split(",")[1] for line in stream.describe(step, batch_size=8, seed=0, rows=range(8))}) == 1
        assert whole.inputs.shape[1] == len(stream.task.problem(0, 0, stream.difficulty_of(0, step, 0)))
        assert torch.equal(stream.batch(step, batch_size=8, seed=0, rows=range(6, 8)).inputs, whole.inputs[6:])
    mixed = prepare_task(task_config(difficulty=[3, 6])).train
    assert len({line.split(",")[1] for line in mixed.describe(0, batch_size=8, seed=0, rows=range(8))}) > 1


def test_the_problems_are_the_same_with_one_difficulty_for_a_batch():
    """A run may be measured beside one trained with the other setting."""
    one, other = (prepare_task(task_config(difficulty=[3, 6], per_problem=each)) for each in (True, False))
    assert one.fingerprint == other.fingerprint
    assert one.facts == other.facts


def test_heldout_problems_do_not_depend_on_the_seed_of_training_and_are_not_its_own():
    data = prepare_task(task_config(difficulty=[24, 24]))
    heldout = {tuple(problem.inputs) for problem in data.heldout(64, 24)}
    assert heldout == {tuple(problem.inputs) for problem in data.heldout(64, 24)}
    assert heldout.isdisjoint(tuple(row) for row in data.train.batch(0, batch_size=64, seed=0).inputs.tolist())


def test_another_range_or_another_option_is_another_fingerprint():
    prints = {prepare_task(config).fingerprint for config in (
        task_config(), task_config(difficulty=[1, 8]), task_config(layout="causal"))}
    assert len(prints) == 3
    assert prepare_task(task_config()).fingerprint in prints


@pytest.mark.parametrize(("settings", "words"), [
    ({"name": "sudoku", "layout": "causal"}, "set task.layout to full"),
    ({"difficulty": [0, 4]}, "the lowest difficulty of prefix-sums"),
    ({"name": "sudokku"}, "did you mean 'sudoku'"),
    ({"name": "sudoku", "options": {"sise": 4}}, "did you mean 'size'"),
])
def test_a_task_that_cannot_be_had_is_one_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        prepare_task(task_config(**settings))


@pytest.mark.parametrize(("settings", "words"), [
    ({"task.name": "sudoku"}, "set denoise.context to inject"),
    ({"task.name": "sudoku", "task.difficulty": [9, 3]}, "is descending"),
    ({"denoise.carry": "latent", "denoise.context": "inject"}, "set denoise.context to concat or context"),
    ({"objective": "truncated", "recurrence.loss_on": "every"}, "recurrence.per_sequence to false"),
])
def test_settings_that_do_not_go_together_are_one_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        load_config(None, settings)


def test_what_a_step_hands_on_is_allowed_where_all_cells_are_sought_together():
    config = load_config(None, {"task.name": "sudoku", "denoise.context": "inject", "denoise.carry": "latent"})
    assert config.task.name


def test_settling_by_confidence_is_for_the_cells_of_a_task():
    with pytest.raises(UserError, match=r"needs task\.name"):
        load_config(None, {"denoise.order": "confidence"})


def test_a_window_is_for_cells_that_are_sought_together():
    with pytest.raises(UserError, match=r"set task\.layout to full"):
        task_config(layout="causal", window=1)
    assert prepare_task(task_config(window=2)).train.batch(0, batch_size=2, seed=0).window == 2
