"""How a latent comes to rest, on maps whose contraction is known; and whether the start decides the answer."""

import pytest
import torch

from looped.config import load_config
from looped.data.task_data import prepare_task
from looped.evaluation.depth_verdicts import periods_of, verdict
from looped.evaluation.metric_rows import Row
from looped.evaluation.stability import Stability, median_row, stability
from looped.evaluation.state_stats import StateStats
from looped.models.build import build
from looped.objectives import build_objective

TINY = {"task.name": "prefix-sums", "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1,
        "denoise.cond_width": 8, "denoise.target.dim": 4, "denoise.context": "inject", "recurrence.mean": 3,
        "evaluation.num_problems": 6, "evaluation.batch_size": 4}


class Linear(torch.nn.Module):
    """s <- rate s + e."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, state, e, cond=None, rows=None):
        return self.rate * state + e


def made(objective="full", core=None, **settings):
    config = load_config(None, TINY | {"objective": objective} | settings)
    data = prepare_task(config.task)
    built = build_objective(config, build(config, data.vocab_size))
    if core is not None:
        built.model.recurrence.core = core
    return built, data, config


def watched(depth=12, difficulty=5, **settings):
    return stability(*made(**settings), depth, difficulty)


def means(found, metric):
    return [row.mean for row in found.by_step(metric).values()]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("rate", [0.5, -0.8])
def test_contraction_is_that_of_a_linear_map_and_its_start_is_forgotten(rate):
    found = watched(core=Linear(rate), depth=24)
    assert means(found, "contraction") == pytest.approx([abs(rate)] * len(means(found, "contraction")), rel=2e-2)
    assert means(found, "latent_change")[-1] < 0.05
    assert found.figure("same_answer").mean == 1
    assert found.figure("latent_cosine").mean == pytest.approx(1, abs=1e-4)
    assert found.figure("latent_distance").mean < 0.02
    assert "changes shrink" in found.sentence
    assert found.start == "other noise"


@pytest.mark.usefixtures("unchecked")
def test_a_map_that_expands_does_not_come_to_rest_and_remembers_its_start():
    found = watched(core=Linear(3.0), depth=24)
    assert means(found, "contraction")[4:] == pytest.approx([3.0] * 18, rel=1e-3)
    assert means(found, "latent_rms") == sorted(means(found, "latent_rms"))
    assert found.figure("latent_distance").mean > 0.2
    assert found.figure("same_answer").mean < 1
    assert "do not shrink" in found.sentence


@pytest.mark.usefixtures("unchecked")
def test_rounding_is_no_contraction():
    found = watched(core=Linear(0.1), depth=24)
    assert 1 <= len(means(found, "contraction")) < 10
    assert "converges before the second half" in found.sentence


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("rate", "distance"), [(0.5, 0), (1.0, 1)])
def test_a_loop_that_always_starts_alike_starts_elsewhere_from_another_problems_end(rate, distance):
    found = watched(core=Linear(rate), depth=24, **{"model.state_init": "zero"})
    assert found.start == "the last state of another problem"
    assert (found.figure("latent_distance").mean > 0.1) == bool(distance)
    alone = watched(core=Linear(rate), depth=4, **{"evaluation.batch_size": 5, "model.state_init": "zero"})
    assert alone.figure("same_answer").n == 5  # the sixth is alone in its batch
    assert watched(depth=2, **{"evaluation.num_problems": 1, "model.state_init": "zero"}).figure("same_answer") is None


@pytest.mark.usefixtures("unchecked")
def test_answers_that_turn_around_are_seen_by_step():
    """s <- -s + e goes between two states, and the readouts of both differ for some problems."""
    found = watched(core=Linear(-1.0), depth=24)
    periods = periods_of(found.answers)
    assert found.answers.shape == (24, 6, 1 + 5)
    assert set(periods.tolist()) <= {1, 2}
    assert (periods == 2).any()
    right = {depth: torch.ones(6) for depth in (1, 24)}
    assert verdict(right, answers=found.answers).name == "cycles"


@pytest.mark.parametrize("solver", ["euler", "heun", "ancestral"])
def test_a_denoiser_is_watched_by_its_soft_estimate(solver):
    found = watched(objective="denoise", depth=6, **{"denoise.solver": solver})
    assert (found.latent, found.start) == ("soft estimate", "other noise")
    assert len(found.by_step("latent_change")) == len(found.answers) - 1
    assert 0 <= found.figure("same_answer").mean <= 1
    assert -1 <= found.figure("latent_cosine").mean < 1


def test_a_denoiser_that_starts_at_zero_is_held_against_one_that_starts_from_noise():
    found = watched(objective="denoise", depth=6, **{"denoise.solver": "euler", "denoise.start": "zero"})
    assert found.figure("latent_distance").mean > 0
    assert "from another start (other noise)" in found.sentence


def test_what_only_fills_up_a_batch_counts_nowhere():
    latent = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    cells = torch.tensor([[True, True, False], [True, True, True]])
    whole, part = StateStats(), StateStats(cells)
    for step in range(3):
        whole.take(latent[:, :2] * 0.5**step)
        part.take((latent + 9 * ~cells.unsqueeze(-1)) * 0.5**step)
    for name in ("sizes", "changes", "ratios"):
        assert getattr(part, name)[-1][0] == pytest.approx(getattr(whole, name)[-1][0].item(), rel=1e-6)
    assert part.ratios[-1].tolist() == pytest.approx([0.5, 0.5])


def test_the_interval_of_a_median_covers_it_as_often_as_it_says():
    draws = torch.randn(2000, 101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = [median_row("x", values) for values in draws]
    assert all(row.ci_low <= row.mean <= row.ci_high for row in rows)
    assert sum(row.ci_low <= 0 <= row.ci_high for row in rows) / 2000 == pytest.approx(0.95, abs=0.02)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("rate", "grows"), [(1.0, True), (0.5, False)])
def test_a_state_that_grows_with_depth_is_told_of(rate, grows):
    assert ("the state grows with depth: its root mean square is" in watched(core=Linear(rate)).sentence) == grows


@pytest.mark.parametrize(("low", "high", "said"), [(0.9, 0.95, "shrink"), (1.0, 1.1, "do not shrink"),
                                                   (0.97, 1.02, "neither clearly shrink nor grow")])
def test_changes_are_said_to_shrink_where_the_interval_does(low, high, said):
    rows = [Row("contraction", (low + high) / 2, low, high, 16, depth=step) for step in range(2, 9)]
    assert Stability("state", "other noise", 8, 1, rows, torch.zeros(0, 0, 0, dtype=torch.long)).motion == said
