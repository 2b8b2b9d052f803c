"""The solver that settles the surest cells first, and the levels that training shows it."""

import pytest
import torch

from looped.config import load_config
from looped.data.batch import collate
from looped.data.task import find_task
from looped.data.task_data import prepare_task
from looped.diffusion.samplers import Settling, sample_by_confidence
from looped.errors import UserError
from looped.inference.rollout import answer
from looped.models.build import build
from looped.objectives import build_objective
from looped.objectives.denoise import reads_first
from looped.rng import StepRandom

LOW, HIGH = 0.5, 20.0
CONFIG = {"task.name": "sudoku", "denoise.context": "inject", "denoise.order": "confidence", "model.width": 16,
          "model.num_heads": 2, "denoise.cond_width": 8, "denoise.target.dim": 4}


def solved(confidences, sought, num_steps):
    """(levels at each reading, z at each reading, the last estimate) with the given confidences."""
    levels, states, ask = [], [], iter(confidences)

    def denoise(z, level):
        levels.append(level)
        states.append(z)
        return torch.full_like(z, float(len(levels)))

    z = HIGH * torch.ones(*sought.shape, 2)
    last = sample_by_confidence(denoise, z, (LOW, HIGH), num_steps, Settling(lambda: next(ask), sought),
                                random=lambda step: torch.zeros_like(z))
    return levels, states, last


def test_the_surest_cells_settle_first_and_an_even_share_at_each_step():
    sought = torch.tensor([[True, True, False, True, True]])
    sure = torch.tensor([[0.1, 0.9, 1.0, 0.5, 0.4]])
    levels, states, last = solved([sure] * 3, sought, 4)
    settled = [(level == LOW)[0].tolist() for level in levels]
    assert settled[0] == [False, False, True, False, False]  # what is given
    assert settled[1] == [False, True, True, False, False]
    assert settled[2] == [False, True, True, True, False]
    assert settled[3] == [False, True, True, True, True]
    assert states[1][0, 1].tolist() == [1.0, 1.0]  # what the first reading made of it
    assert states[3][0, 1].tolist() == [1.0, 1.0]  # it stays
    assert states[3][0, 4].tolist() == [3.0, 3.0]
    assert last[0, 0].tolist() == [4.0, 4.0]


def test_what_has_settled_stays_though_it_may_look_unsure_later():
    sought = torch.ones(1, 3, dtype=torch.bool)
    first, second = torch.tensor([[0.9, 0.1, 0.2]]), torch.tensor([[0.0, 0.1, 0.2]])
    levels, _, _ = solved([first, second], sought, 3)
    assert [(level == LOW)[0].tolist() for level in levels] == [
        [False] * 3, [True, False, False], [True, False, True]]


def test_one_step_reads_pure_noise_once():
    levels, _, _ = solved([], torch.ones(1, 3, dtype=torch.bool), 1)
    assert [level.tolist() for level in levels] == [[[HIGH] * 3]]


def test_training_shows_any_share_of_settled_cells_evenly():
    config = load_config(None, CONFIG | {"denoise.noise.share_at_max": 1.0})
    objective = build_objective(config, build(config, 5))
    levels = objective.levels(StepRandom(0, 0, count=512), 16)
    assert set(levels.unique().tolist()) == {config.denoise.noise.sigma_min, config.denoise.noise.sigma_max}
    share = (levels == config.denoise.noise.sigma_min).double().mean(1).sort().values
    assert abs(share - torch.linspace(0, 1, 512)).max() < 0.12
    loss = objective(collate(find_task("sudoku"), [find_task("sudoku").problem(0, 0, 10)] * 4, causal=False),
                     StepRandom(0, 0, count=4))
    assert loss.value.isfinite()


def test_the_solver_runs_on_problems_and_gives_back_what_the_network_says():
    config = load_config(None, CONFIG)
    objective = build_objective(config, build(config, 5)).eval()
    task = find_task("sudoku")
    batch = collate(task, [task.problem(0, index, 10) for index in range(3)], causal=False)
    found = answer(objective, batch, [1, 5], config)
    assert found[5].used.tolist() == [5, 5, 5]
    assert found[5].answers.shape == batch.inputs.shape


def test_cells_that_are_surer_than_asked_settle_besides():
    sought = torch.ones(1, 4, dtype=torch.bool)
    sure = torch.tensor([[0.97, 0.99, 0.1, 0.96]])
    settled = []

    def denoise(z, level):
        settled.append((level == LOW)[0].tolist())
        return z

    z = torch.zeros(1, 4, 2)
    sample_by_confidence(denoise, z, (LOW, HIGH), 4, Settling(lambda: sure, sought, 0.95),
                         random=lambda step: torch.zeros_like(z))
    assert settled[1] == [True, True, False, True]
    assert settled[2] == [True, True, False, True]  # three of four would have settled by now anyway
    assert settled[3] == [True, True, False, True]


# ---- training on what has settled


def levels_and_batch(monkeypatch, step, sureness=None, **settings):
    """The noise levels that a training step is given, where the first reading (if there is one) is this sure of each
    cell; and its batch."""
    config = load_config(None, CONFIG | settings)
    data, seen = prepare_task(config.task), []
    objective = build_objective(config, build(config, data.vocab_size)).train()
    losses = objective._losses

    def read(z, sigma, e, *rows):
        assert not torch.is_grad_enabled()
        assert (sigma == objective.noise.sigma_max).all()
        logits = torch.zeros(*z.shape[:2], data.vocab_size)
        logits[..., 1] = sureness
        return logits

    def watched(e, batch, sigma, *rest):
        seen.append(sigma)
        return losses(e, batch, sigma, *rest)

    monkeypatch.setattr(objective, "_losses", watched)
    if sureness is not None:
        monkeypatch.setattr(objective.denoiser, "forward", read)
    batch = data.train.batch(step, batch_size=8, seed=0)
    random = StepRandom(0, step, count=8, total=8)
    objective(batch, random)
    return seen[0], batch, random, objective


def test_in_half_of_the_steps_the_cells_that_a_first_reading_is_surest_of_are_settled(monkeypatch):
    sureness = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    firsts = [step for step in range(200) if reads_first(StepRandom(0, step, count=8))]
    assert 70 < len(firsts) < 130
    sigma, batch, random, objective = levels_and_batch(monkeypatch, firsts[0], sureness,
                                                       **{"denoise.settled": "surest"})
    settled = (sigma == objective.noise.sigma_min) & batch.scored
    share = random.stratified("share settled")
    assert settled.sum(1).tolist() == (share * batch.scored.sum(1)).round().tolist()
    for row in range(8):
        known, left = sureness[row][settled[row]], sureness[row][batch.scored[row] & ~settled[row]]
        assert not len(known) or not len(left) or known.min() > left.max()


def test_in_the_other_steps_any_cells_are_settled_as_without_it(monkeypatch):
    step = next(step for step in range(50) if not reads_first(StepRandom(0, step, count=8)))
    surest = levels_and_batch(monkeypatch, step, **{"denoise.settled": "surest"})[0]
    assert torch.equal(surest, levels_and_batch(monkeypatch, step)[0])


def test_a_first_reading_costs_half_a_pass_and_needs_the_order_by_confidence(monkeypatch):
    plain, surest = (levels_and_batch(monkeypatch, 0, **{"denoise.settled": settled})[3].layer_forwards()
                     for settled in ("random", "surest"))
    model = load_config(None, CONFIG).model
    assert surest - plain == 0.5 * (model.num_core_layers + model.num_coda_layers)
    with pytest.raises(UserError, match="settled surest needs order confidence, and order is together"):
        load_config(None, {"denoise.settled": "surest"})
