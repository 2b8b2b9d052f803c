"""Several trajectories of loops and solvers: each from its own draws, together or in turn; one choice among them."""

import pytest
import torch

from looped.config import load_config
from looped.config.choices import CHOICES, NEEDS
from looped.config.unread_settings import unread
from looped.data.batch import Batch
from looped.data.task_data import prepare_task
from looped.errors import UserError
from looped.evaluation.solving import any_right, solved
from looped.inference.choices import CLASSES, Best, Runs, choice_of
from looped.inference.denoiser_rollout import Solver
from looped.inference.exits import Exit
from looped.inference.motion import WINDOW, Motion
from looped.inference.rollout import answer, rollout_of
from looped.inference.trajectories import together
from looped.models.build import build
from looped.nn.state_noise import with_noise
from looped.objectives import build_objective
from looped.objectives.base import rows_of_batch
from looped.rng import StepRandom

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

TINY = {"task.name": "prefix-sums", "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1,
        "denoise.cond_width": 8, "denoise.target.dim": 4, "denoise.context": "inject", "recurrence.mean": 3,
        "supervision.segments": 2, "model.state_init": "like-init", "evaluation.num_problems": 4,
        "evaluation.batch_size": 4}


def made(objective="full", **settings):
    config = load_config(None, TINY | {"objective": objective} | settings)
    model = build_objective(config, build(config, 4)).eval()
    with torch.no_grad():  # far from the start, where a readout says nothing
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, config


def problems(config, *bits):
    data = prepare_task(config.task)
    return data.collate([data.task.problem(0, index, number) for index, number in enumerate(bits)])


def runs_of(logits, **figures):
    """Runs of one problem per row of `logits` (runs, B, L, V); every cell counts but the last."""
    logits = torch.tensor(logits, dtype=torch.float32)
    num, length = logits.shape[1:3]
    scored = torch.ones(num, length, dtype=torch.bool)
    scored[:, -1] = False
    batch = Batch(torch.zeros(num, length, dtype=torch.long), torch.zeros(num, length, dtype=torch.long), scored)
    figures = {name: torch.tensor(value) for name, value in figures.items()}
    return Runs(batch, logits, torch.ones(logits.shape[:2], dtype=torch.long), **figures)


def test_each_choice_on_a_small_table():
    """Three trajectories of one problem with two scored cells and two symbols; the last cell is not scored."""
    first, second, third = [[0, 1], [0, 1], [9, 0]], [[0, 1], [0, 1], [0, 9]], [[8, 0], [3, 0], [0, 9]]
    runs = runs_of([[first], [second], [third]], residual=[[0.3], [0.1], [0.2]], halt=[[0.0], [-1.0], [2.0]])
    found = {name: choice_of(name).answer(runs)[0, :2].tolist() for name in CLASSES if name != "consistent"}
    assert found == {"mean": [0, 1], "vote": [1, 1], "cell-vote": [1, 1], "confidence": [0, 0], "residual": [1, 1],
                     "head": [0, 0]}
    assert choice_of("vote").score(runs).tolist() == [[2.0], [2.0], [1.0]]


def test_a_judge_that_a_run_lacks_is_named():
    assert set(CLASSES) == set(CHOICES)
    for name in NEEDS:
        with pytest.raises(UserError, match=f"evaluation.choose {name} needs .*, and this run has none"):
            choice_of(name).answer(runs_of([[[[1.0, 0.0]]]]))
    with pytest.raises(UserError, match="did you mean"):
        choice_of("votes")
    with pytest.raises(UserError, match="is no choice"):
        choice_of("looped.inference.choices.Runs")


class Worst(Best):
    """A custom choice: the least confident trajectory."""

    def score(self, runs):
        return -choice_of("confidence").score(runs)


def test_a_custom_choice_is_named_by_its_path():
    runs = runs_of([[[[0, 1], [0, 0]]], [[[8, 0], [0, 0]]]])
    assert choice_of(f"{__name__}.Worst").answer(runs)[0, 0] == 1
    assert choice_of("confidence").answer(runs)[0, 0] == 0  # the control


@pytest.mark.parametrize(("objective", "choose"), [("full", "head"), ("full", "consistent"), ("one-step", "consistent"),
                                                   ("denoise", "head")])
def test_a_choice_that_the_rule_cannot_make_is_refused_before_training(objective, choose):
    settings = TINY | {"objective": objective, "evaluation.choose": choose}
    load_config(None, settings)  # with one trajectory nothing is chosen
    with pytest.raises(UserError, match=f"evaluation.choose {choose} needs .*objective {objective} has none; set it "
                                        f"to mean"):
        load_config(None, settings | {"evaluation.trajectories": 2})


@pytest.mark.parametrize(("settings", "named"), [
    ({"model.state_init": "zero"}, True), ({}, False),
    ({"model.state_init": "zero", "evaluation.state_noise": 0.1}, False),
    ({"objective": "denoise", "model.state_init": "zero"}, False)])
def test_trajectories_that_are_all_alike_are_warned_of(settings, named):
    config = load_config(None, TINY | {"objective": "full", "evaluation.trajectories": 3} | settings)
    assert bool(unread(config, ["evaluation.trajectories"])) == named


@torch.no_grad()
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_trajectory_is_an_unroll_from_its_own_start_with_its_own_noise(noise):
    model, config = made("full", **{"evaluation.trajectories": 3, "evaluation.state_noise": noise})
    batch, inner = problems(config, 4, 4), model.model
    rows = rows_of_batch(batch)
    e, random = inner.encode(batch.inputs, rows), StepRandom(0, 0, count=2)
    answers, residuals = [], []
    for stream in ("", "trajectory1 ", "trajectory2 "):
        state = inner.initial_state(e, random.normal(f"{stream}state", e.shape[1:]))
        changes = []
        for step in range(5):
            given = with_noise(state, random.normal(f"{stream}state noise {step}", e.shape[1:]), noise)
            after = inner.step(given, e, None, rows)
            kept = batch.sought.unsqueeze(-1)
            changes.append(((after - state) * kept).flatten(1).norm(dim=1) / (after * kept).flatten(1).norm(dim=1))
            state = after
        answers.append(inner.decode(state, rows).argmax(-1))
        residuals.append(torch.stack(changes[-WINDOW:]).mean(0))
    found = answer(model, batch, [2, 5], config)[5]
    assert torch.equal(found.tried, torch.stack(answers))
    assert found.used.tolist() == [15, 15]
    least = answer(model, batch, [5], config.replace(**{"evaluation.choose": "residual"}))[5]
    best = torch.stack(residuals).argmin(0)
    assert torch.equal(least.answers, torch.stack(answers)[best, torch.arange(2)])
    if noise:  # the control
        assert not torch.equal(found.tried, answer(model, batch, [5], config.replace(
            **{"evaluation.state_noise": 0.0}))[5].tried)


@torch.no_grad()
@pytest.mark.parametrize("exit", [None, "answer=2"])
@pytest.mark.parametrize("objective", ["full", "one-step", "fixed-point"])
def test_trajectories_are_the_same_together_and_in_turn_alone_and_in_a_batch(objective, exit):
    if objective == "fixed-point":
        pytest.importorskip("torchdeq")
    model, config = made(objective, **{"evaluation.trajectories": 5, "evaluation.state_noise": 0.2,
                                       "evaluation.choose": "head" if objective == "one-step" else "confidence"})
    batch, rule = problems(config, 6, 3, 5), exit and Exit.parse(exit)
    in_turn = answer(model, batch, [2, 6], config.replace(**{"evaluation.batch_size": 3}), exit=rule)
    at_once = answer(model, batch, [2, 6], config.replace(**{"evaluation.batch_size": 64}), exit=rule)
    for depth in (2, 6):
        assert torch.equal(in_turn[depth].tried, at_once[depth].tried)
        assert torch.equal(in_turn[depth].answers, at_once[depth].answers)
        assert torch.equal(in_turn[depth].used, at_once[depth].used)
    if exit:
        assert (at_once[6].used < 30).any()
    for row, bits in enumerate((6, 3, 5)):
        data = prepare_task(config.task)
        alone = answer(model, data.collate([data.task.problem(0, row, bits)]), [6], config, first=row, exit=rule)[6]
        length = alone.answers.shape[1]
        assert torch.equal(alone.tried[:, 0], at_once[6].tried[:, row, :length])
        assert alone.used[0] == at_once[6].used[row]


def test_parts_of_trajectories_fit_the_batch_size():
    assert [list(part) for part in together("abcde", 2, 4)] == [["a", "b"], ["c", "d"], ["e"]]
    assert [list(part) for part in together("ab", 9, 4)] == [["a"], ["b"]]


def test_all_trajectories_are_paid_for_and_share_the_prelude():
    model, config = made("full", **{"evaluation.trajectories": 4, "model.num_coda_layers": 1})
    cost = rollout_of(model).answer_cost(6, config.evaluation)
    assert (cost.layer_forwards, cost.evaluations) == (1 + 4 * (6 + 1), 24)


@torch.no_grad()
def test_rows_say_how_many_trajectories_there_were_and_what_any_of_them_solves():
    model, config = made("full", **{"evaluation.trajectories": 6, "evaluation.choose": "vote",
                                    "evaluation.state_noise": 0.5})
    data = prepare_task(config.task)
    found = solved(model, data, config, [3], [1])
    rows = {row.metric: row for row in found.rows}
    assert {row.trajectories for row in found.rows} == {6}
    assert {row.evaluations for row in found.rows} == {18}
    batch = data.collate(data.heldout(4, 1))
    tried = answer(model, batch, [3], config)[3].tried.numpy()
    right = [any_right(data, problem, tried[:, place]) for place, problem in enumerate(data.heldout(4, 1))]
    assert rows["solved_by_any"].mean == sum(right) / 4 >= rows["solved"].mean
    assert found.by_any[1][3].tolist() == right
    single = solved(model, data, config.replace(**{"evaluation.trajectories": 1}), [3], [1])
    assert {row.metric: row.trajectories for row in single.rows} == {"solved": None, "cells": None}


@torch.no_grad()
def test_a_denoiser_chooses_by_the_same_judges():
    model, config = made("denoise", **{"evaluation.trajectories": 3, "evaluation.choose": "residual"})
    batch = problems(config, 5, 4)
    solver, streams = Solver(model, batch), ("", "trajectory1 ", "trajectory2 ")
    motions = [Motion(batch) for _ in streams]
    ends = [solver.run(4, StepRandom(0, 0, count=2), stream=stream, motion=motion)
            for stream, motion in zip(streams, motions, strict=True)]
    best = torch.stack([motion.residual for motion in motions]).argmin(0)
    answers = torch.stack([end.logits.argmax(-1) for end in ends])
    found = answer(model, batch, [4], config)[4]
    assert torch.equal(found.answers, answers[best, torch.arange(2)])
    assert torch.equal(found.tried, answers)


def test_a_residual_is_the_mean_over_the_last_steps_of_each_problem():
    batch = Batch(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long))
    motion, both, one = Motion(batch), torch.tensor([0, 1]), torch.tensor([1])
    assert motion.residual.tolist() == [0.0, 0.0]
    motion.take(both, torch.tensor([[[1.0]], [[1.0]]]), torch.tensor([[[2.0]], [[4.0]]]))
    for after in (4.0, 2.0, 2.0):
        motion.take(one, torch.tensor([[[1.0]]]), torch.tensor([[[after]]]))
    torch.testing.assert_close(motion.residual, torch.tensor([0.5, (0.75 + 0.5 + 0.5) / 3]))
