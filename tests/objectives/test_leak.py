"""No position may see its own answer or later tokens, under any training rule and context; with a positive control."""

import pytest
import torch

from looped.config import load_config
from looped.inference.text_denoising import TeacherForced
from looped.models.build import build
from looped.objectives import build_objective
from looped.rng import StepRandom

V, L, CUT = 40, 10, 5
SMALL = {"model.width": 16, "model.num_heads": 2, "denoise.target.dim": 8, "denoise.cond_width": 8,
         "denoise.noise.distribution": "log-uniform", "evaluation.prompt_length": 4, "data.length": L}
CONTEXTS = ["inject", "concat", "context"]


def make(**flags):
    config = load_config(None, SMALL | flags)
    objective = build_objective(config, build(config, V)).double().eval()
    with torch.no_grad():  # a zero-initialised modulation would hide a path
        for name, parameter in objective.named_parameters():
            if "modulation" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.1)
    return objective


def tokens(change_from=None):
    rows = torch.randint(V, (2, L + 1), generator=torch.Generator().manual_seed(0))
    if change_from is not None:
        rows[:, change_from:] = (rows[:, change_from:] + 7) % V
    return rows


def denoise_logits(objective, rows, sigma=2.0):
    """Logits where only the tokens change: the noise is the same, the targets are those of the rows."""
    target = objective.denoiser.target(rows[:, 1:]).double()
    eps = torch.randn(target.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    level = torch.full((2,), sigma, dtype=torch.float64)
    return objective.logits(rows[:, :-1], target + sigma * eps, level).detach()


@pytest.mark.parametrize("kind", CONTEXTS)
def test_denoising_at_position_i_does_not_move_with_tokens_after_its_target(kind):
    objective = make(**{"denoise.context": kind})
    before, after = denoise_logits(objective, tokens()), denoise_logits(objective, tokens(CUT + 1))
    # Row i holds the noised token i + 1, so rows up to CUT - 1 know tokens up to CUT and nothing that changed.
    torch.testing.assert_close(before[:, :CUT], after[:, :CUT], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(before[:, CUT:], after[:, CUT:], atol=1e-3)  # positive control: the change arrives


@pytest.mark.parametrize("kind", CONTEXTS)
def test_a_planted_leak_is_seen(kind, monkeypatch):
    objective = make(**{"denoise.context": kind})
    encode = objective.model.encode
    monkeypatch.setattr(objective.model, "encode", lambda x, *rows: encode(x) + encode(x).mean(1, keepdim=True))
    before, after = denoise_logits(objective, tokens()), denoise_logits(objective, tokens(CUT + 1))
    assert not torch.allclose(before[:, :CUT], after[:, :CUT], atol=1e-6)


@pytest.mark.parametrize("kind", CONTEXTS)
def test_the_clean_context_is_used(kind):
    objective, rows = make(**{"denoise.context": kind}), tokens()
    scrambled = rows.clone()
    scrambled[:, : CUT - 1] = (rows[:, : CUT - 1] + 7) % V
    before, after = denoise_logits(objective, rows), denoise_logits(objective, scrambled)
    assert not torch.allclose(before[:, CUT], after[:, CUT], atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("kind", CONTEXTS)
def test_a_teacher_forced_solver_does_not_see_its_answer(kind, num_steps):
    objective = make(**{"denoise.context": kind}).float()

    def log_probs(rows):
        # The probability of one fixed token at every position: it moves only if the logits move.
        solver = TeacherForced(objective, rows)
        solver.y = torch.zeros_like(solver.y)
        return solver.log_probs(num_steps, StepRandom(0, 0, count=2), "t").detach()

    before, after = log_probs(tokens()), log_probs(tokens(CUT))
    torch.testing.assert_close(before[:, :CUT], after[:, :CUT], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before[:, CUT:], after[:, CUT:], atol=1e-3)


@pytest.mark.parametrize("rule", ["full", "truncated"])
def test_loops_are_causal(rule):
    objective = make(objective=rule, **{"model.state_init": "zero"})
    model = objective.model
    before, after = (model(rows[:, :-1], 3).detach() for rows in (tokens(), tokens(CUT)))
    torch.testing.assert_close(before[:, :CUT], after[:, :CUT], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(before[:, CUT:], after[:, CUT:], atol=1e-3)
