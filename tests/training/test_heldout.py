"""Held-out figures while training goes on: how often, what has been spent by then, and one that objectives share."""

import json

import pytest
import torch

from looped.config.training import TrainingConfig
from looped.evaluation.likelihood import losses_by_depth, losses_by_sigma
from looped.training.counters import Counters
from looped.training.heldout import heldout_figures
from looped.training.runs import load_run
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls


def heldout_lines(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "heldout"]


@pytest.mark.parametrize(("unit", "budget"), [("steps", 10), ("tokens", 320), ("layer-forwards", 360)])
def test_evaluations_are_spread_evenly_over_a_budget_in_any_unit(tmp_path, tiny, unit, budget):
    train(tiny(**{"training.budget": budget, "training.budget_unit": unit, "training.num_evals": 5}), tmp_path / "run")
    lines = heldout_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    assert [line["tokens"] for line in lines] == [64, 128, 192, 256, 320]
    assert [line["layer_forwards"] for line in lines] == [72, 144, 216, 288, 360]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_as_many_evaluations_as_steps_are_due_at_every_step():
    for budget in range(1, 400):
        training = TrainingConfig(budget=budget, num_evals=budget)
        assert [Counters(step=step).due(training) for step in range(budget + 1)] == list(range(budget + 1))
    assert 29 / 50 * 50 < 29  # a positive control: the fraction of the budget is rounded
    seconds = TrainingConfig(budget=10, budget_unit="seconds", num_evals=4)
    assert [Counters(seconds=spent).due(seconds) for spent in (0.0, 2.4, 2.5, 9.9, 10.1)] == [0, 0, 1, 3, 4]


def test_more_evaluations_than_steps_are_one_a_step(tmp_path, tiny):
    train(tiny(**{"training.budget": 3, "training.num_evals": 100}), tmp_path / "run")
    assert [line["step"] for line in heldout_lines(tmp_path / "run")] == [1, 2, 3]


def test_an_interrupted_run_is_evaluated_where_an_undisturbed_one_is(tmp_path, tiny):
    config = tiny(**{"training.num_evals": 3})
    train(config, tmp_path / "whole")
    calls = []

    def interrupt(objective, data, config):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return heldout_figures(objective, data, config)

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "broken", evaluate=interrupt)
    train(config, tmp_path / "broken")
    whole, broken = ([line | {"seconds": 0} for line in heldout_lines(tmp_path / name)] for name in ("whole", "broken"))
    assert whole == broken
    assert len(whole) == 3


@pytest.mark.parametrize(("objective", "depth"), [("ar", 1), ("truncated", 3), ("full", 3), ("denoise", None)])
def test_the_shared_figure_is_a_loop_at_its_mean_depth_and_a_denoiser_at_sigma_max(tmp_path, tiny, objective, depth):
    config = tiny(objective=objective)
    train(config, tmp_path / "run")
    run = load_run(tmp_path / "run")
    tokens = run.data.heldout.sequences(4, 8)
    if depth is None:
        sigma, losses = losses_by_sigma(run.objective, tokens)[0]
        losses = losses + run.objective.denoiser.targets.row_norm**2 / (2 * sigma**2)  # what z says of a token there
        assert sigma == pytest.approx(config.denoise.noise.sigma_max)
    else:
        losses = losses_by_depth(run.objective, tokens, [depth])[0].losses
    with torch.no_grad():
        assert heldout_figures(run.objective, run.data, config)["next_token"] == pytest.approx(losses.mean().item())
    assert heldout_lines(tmp_path / "run")[-1]["next_token"] == pytest.approx(losses.mean().item())
