"""Each probe finds the fault it looks for, planted, and stays silent on a model without it."""

import math
from types import SimpleNamespace

import pytest
import torch

from looped.config import load_config
from looped.data.batch import Batch
from looped.evaluation.likelihood import losses_by_depth
from looped.evaluation.probes import (
    _against_chance,
    block_reading,
    decodability,
    depth_verdict,
    loop_probes,
    probe,
    scrambled_context,
)
from looped.evaluation.sample_quality import Reference
from looped.evaluation.state_stats import growth
from looped.models.build import build
from looped.nn.recurrence import RecurrentDepth
from looped.objectives import build_objective
from looped.rng import StepRandom

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

V = 30


def make(objective="denoise", **flags):
    config = load_config(None, {"objective": objective, "model.width": 16, "model.num_heads": 2,
                                "denoise.target.dim": 6, "denoise.cond_width": 8} | flags)
    return build_objective(config, build(config, V)).eval()


def rows(num=8):
    return torch.randint(V, (num, 13), generator=torch.Generator().manual_seed(0))


def probed(objective, tokens, depths=(1, 4), **settings):
    by_depth = {result.depth: result.losses for result in losses_by_depth(objective, tokens, depths)}
    return probe(objective, tokens, by_depth, vocab_size=V, **settings)


@pytest.fixture(scope="module")
def learned():
    """A loop that has learned to repeat the present token, and text that does nothing else."""
    objective = make("ar")
    tokens = torch.arange(8).unsqueeze(1).expand(-1, 13).contiguous()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    for step in range(40):
        optimizer.zero_grad()
        objective(tokens, StepRandom(0, step, count=8)).value.backward()
        optimizer.step()
    return objective.eval(), tokens


def test_a_model_that_has_learned_is_not_complained_about(learned):
    objective, tokens = learned
    found = probed(objective, tokens, depths=(1,), twin=Reference("twin", objective, 1))
    assert found.sentences == []
    figures = {row.metric: row.mean for row in found.rows}
    assert figures["scrambled_context_costs"] > 1
    assert figures["behind_the_twin"] == pytest.approx(0, abs=1e-6)
    assert figures["ln_vocabulary"] == pytest.approx(math.log(V))


def test_the_baseline_is_read_at_its_own_depth():
    """One pass of a baseline of two blocks is a loop step of each."""
    objective, tokens = make("ar", **{"blocks.num": 2, "model.num_core_layers": 2}), rows()
    behind = {depth: next(row.mean for row in probed(objective, tokens, depths=(2,), twin=Reference(
        "twin", objective, depth)).rows if row.metric == "behind_the_twin") for depth in (1, 2)}
    assert behind[2] == pytest.approx(0, abs=1e-6)
    assert abs(behind[1]) > 1e-3


def test_a_copier_is_found():
    """Bayes' rule over a flat prior: perfect at low noise, chance where it counts, deaf to its context."""
    objective = make()
    objective.model.embed.weight.data.zero_()
    found = probed(objective, rows())
    assert any("no better than chance" in sentence for sentence in found.sentences)
    assert any("ignores its context" in sentence for sentence in found.sentences)


def test_a_context_that_is_used_costs_when_it_is_scrambled(learned):
    objective, tokens = learned
    deaf = make()
    deaf.model.embed.weight.data.zero_()
    assert scrambled_context(objective, tokens).mean() > 1
    assert scrambled_context(deaf, tokens).abs().max() < 1e-5


@pytest.mark.parametrize(("losses", "said"), [
    ({1: 4.0, 4: 3.5, 16: 3.5}, ""), ({1: 4.0, 4: 3.5, 16: 3.509}, ""), ({1: 3.5, 4: 3.6, 16: 3.9}, "falls"),
    ({1: 4.0, 4: 3.5, 16: 3.53}, "drifts")])
def test_the_verdict_on_a_depth_curve(losses, said):
    common = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sentence = depth_verdict({depth: common + mean for depth, mean in losses.items()})
    assert (said in sentence) if said else sentence == ""


def test_a_rise_that_is_within_the_spread_of_sequences_is_no_fall():
    noise = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert depth_verdict({1: torch.zeros(64, dtype=torch.float64), 2: 0.1 + (noise - noise.mean()) * 3}) == ""


def test_a_limit_is_passed_by_the_whole_interval_and_not_by_its_middle():
    """A few sequences whose mean is just beyond a limit say nothing; many do."""
    middle = math.log(V) - 0.45
    spread = torch.linspace(-1, 1, 8, dtype=torch.float64)
    assert _against_chance(middle + spread, V) == ""
    assert "no better than chance" in _against_chance(middle + spread / 100, V)
    assert _against_chance(middle - 0.2 + spread / 100, V) == ""


def test_the_decodable_level_is_where_half_of_the_nearest_rows_are_right_and_scales_with_the_rows():
    objective, y = make(), rows(200)[:, 1:]
    sigma, share = decodability(objective.denoiser.table(), objective, y)
    table = objective.denoiser.table()
    answers = torch.randint(V, (20_000,), generator=torch.Generator().manual_seed(3))
    z = table[answers] + sigma * torch.randn(20_000, 6, generator=torch.Generator().manual_seed(4))
    assert (torch.cdist(z, table).argmin(-1) == answers).float().mean() == pytest.approx(0.5, abs=0.04)
    assert share == pytest.approx(objective.noise.cdf(sigma).item(), abs=1e-6)
    double = make(**{"denoise.target.scale": 2.0})
    assert decodability(double.denoiser.table(), double, y)[0] == pytest.approx(2 * sigma, rel=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_contraction_is_that_of_a_linear_loop():
    class Half(torch.nn.Module):
        def forward(self, state, e, cond=None):
            return 0.5 * state + e

    loop = RecurrentDepth(Half(), state_init="zero")
    model = SimpleNamespace(encode=lambda x, rows: torch.randn(*x.shape, 4, generator=torch.Generator().manual_seed(0)),
                            recurrence=loop, unroll=lambda e, rows, **kw: loop.unroll(e, no_grad=0, **kw))
    found = loop_probes(SimpleNamespace(ask=Batch.of, model=model, damping=0.0), rows(), 6)
    contraction = [row.mean for row in found if row.metric == "contraction"]
    assert contraction == pytest.approx([0.5] * 4, rel=1e-5)
    norms = [row.mean for row in found if row.metric == "state_rms"]
    assert norms[-1] / norms[0] == pytest.approx(2 - 0.5**5, rel=1e-5)


def test_a_block_whose_tokens_do_not_read_each_other_is_said_so():
    """Text in which every token comes twice, both in one block: before training nothing is read, after it the other
    token is all that there is to know."""
    objective = make(**{"denoise.block_size": 2, "denoise.order": "left-to-right", "denoise.evidence_in": True,
                        "data.length": 12, "evaluation.prompt_length": 4}).train()
    twice = torch.randint(V, (64, 6), generator=torch.Generator().manual_seed(1)).repeat_interleave(2, dim=1)
    tokens = torch.cat([torch.zeros(64, 1, dtype=torch.long), twice], dim=1)
    said = "do not use each other"
    assert any(said in sentence for sentence in probed(objective, tokens[:8]).sentences)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    for step in range(150):
        objective(tokens, StepRandom(0, step, count=64)).value.backward()
        optimizer.step()
        optimizer.zero_grad()
    alone, known = block_reading(objective.eval(), tokens[:8])
    assert alone.mean() - known.mean() > 0.5
    assert not any(said in sentence for sentence in probed(objective, tokens[:8]).sentences)


@pytest.mark.parametrize(("block", "injection", "grows"), [
    ("prenorm", "add", True), ("sandwich", "add", False), ("prenorm", "linear", False), ("prenorm", "gated", False),
    ("prenorm", "diagonal", False)])
def test_a_state_that_grows_with_depth_is_told_of(block, injection, grows):
    objective = make("full", **{"model.block": block, "model.injection": injection})
    found = probed(objective, rows(4), depths=(1, 16)).sentences
    assert any("grows with depth" in sentence for sentence in found) == grows


def test_growth_is_told_with_the_figures_that_decide_it():
    assert growth({depth: 2.5 * depth for depth in range(1, 65)}) == (
        "the state grows with depth: its root mean square is 2.5, 10, 40, 160 at 1, 4, 16, 64 steps")
    assert growth({depth: depth**0.5 for depth in range(1, 65)}) == ""  # a random walk
    assert growth({1: 1.0, 2: 2.0}) == ""  # too few steps to tell
