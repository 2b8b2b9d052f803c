"""Second readings of an answer: which cells each judges, from what, and the score that comes of it."""

import pytest
import torch

from looped.config import load_config
from looped.data.batch import collate
from looped.data.task import find_task
from looped.diffusion.second_reading import check_level, second_readings
from looped.inference.cost import NUM_CHECKS
from looped.inference.denoiser_rollout import Solver
from looped.models.build import build
from looped.objectives import build_objective
from looped.rng import StepRandom, generator

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

TINY = {"task.name": "sudoku", "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1,
        "denoise.context": "inject", "denoise.cond_width": 8, "denoise.target.dim": 4, "objective": "denoise"}


def solver(order, *difficulties):
    config = load_config(None, TINY | {"denoise.order": order})
    objective = build_objective(config, build(config, 5)).eval()
    task = find_task("sudoku")
    batch = collate(task, [task.problem(0, n, level) for n, level in enumerate(difficulties)], causal=False)
    return Solver(objective, batch), batch


def drawn(*shape):
    return torch.randn(shape, generator=generator("parts"))


def test_under_confidence_every_sought_cell_is_left_out_once_and_the_others_are_fixed():
    made, batch = solver("confidence", 10, 3)
    config, noise, sought = made.config, made.objective.noise, batch.sought
    readings = list(second_readings(config, noise, sought, 4, lambda: drawn(2, 16)))
    assert torch.equal(torch.stack([judged for _, judged in readings]).sum(0), sought.long())
    for level, judged in readings:
        assert torch.equal(level == noise.sigma_max, judged)
        assert ((level == noise.sigma_min) | judged).all()
    sizes = torch.stack([judged.sum(1) for _, judged in readings])
    assert sizes[:, 0].tolist() == [3, 3, 2, 2]
    assert sizes[:, 1].tolist() == [1, 1, 1, 0]
    others = list(second_readings(config, noise, sought, 4, lambda: -drawn(2, 16)))
    assert not torch.equal(others[0].judged, readings[0].judged)  # another draw, other parts


def test_under_other_orders_every_reading_is_of_the_whole_answer_at_one_level():
    made, batch = solver("together", 10)
    readings = list(second_readings(made.config, made.objective.noise, batch.sought, 3, lambda: drawn(1, 16)))
    assert [level for level, _ in readings] == [check_level(made.objective.noise)] * 3
    assert all(torch.equal(judged, batch.sought) for _, judged in readings)


@pytest.mark.parametrize("order", ["confidence", "together"])
def test_the_score_is_the_mean_log_probability_of_the_cells_where_they_are_judged(monkeypatch, order):
    """A left-out cell is pure noise: its own answer reaches the network in the others' cells alone."""
    made, batch = solver(order, 10, 6)
    seen, read = [], made.denoiser.forward
    monkeypatch.setattr(made.denoiser, "forward", lambda z, sigma, *rest: seen.append(
        (z, sigma, logits := read(z, sigma, *rest))) or logits)
    answers = batch.targets
    with torch.no_grad():
        score = made.consistency(answers, StepRandom(0, 0, count=2), "")
    assert len(seen) == NUM_CHECKS
    target, sums = made.denoiser.target(answers), torch.zeros(2)
    for z, sigma, logits in seen:
        levels = sigma if sigma.ndim == 2 else sigma.unsqueeze(1).expand(2, 16)
        judged = batch.sought & (levels > made.objective.noise.sigma_min)
        own = logits.log_softmax(-1).gather(-1, answers.unsqueeze(-1)).squeeze(-1)
        sums += (own * judged).sum(1) / (1 if order == "confidence" else NUM_CHECKS)
        noise = ((z - target) / levels.float().unsqueeze(-1))[batch.sought]
        assert noise.std().item() == pytest.approx(1, abs=0.3)
    torch.testing.assert_close(score, sums / batch.sought.sum(1))


def test_a_cell_that_contradicts_the_others_lowers_the_score_though_it_is_read_back_as_it_was_given(monkeypatch):
    """With a denoiser that knows the rule that all cells are equal, and reads a fixed cell as it is."""
    made, batch = solver("confidence", 15)
    table = made.denoiser.table()

    def ruled(z, sigma, e, rows):
        fixed = sigma < 1
        given = (z @ table.T).argmax(-1)
        votes = torch.stack([((given == token) & fixed).sum(1) for token in range(5)], dim=1).float()
        own = torch.nn.functional.one_hot(given, 5).float()
        return 20 * torch.where(fixed.unsqueeze(-1), own, votes.softmax(1).unsqueeze(1).expand_as(own))

    monkeypatch.setattr(made.denoiser, "forward", ruled)
    right = torch.full((1, 16), 2)
    wrong = right.clone()
    wrong[0, batch.sought[0].nonzero()[3]] = 4
    scores = [made.consistency(each, StepRandom(0, 0, count=1), "").item() for each in (right, wrong)]
    assert scores[0] > -0.1
    assert scores[1] < -0.5
