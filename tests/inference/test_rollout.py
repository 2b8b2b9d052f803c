"""Each rule's class is run as the table of rules says; a rollout refuses what means nothing, and may be one's own."""

import pytest
import torch

from looped.config import load_config
from looped.config.rules import RULES
from looped.config.training import EvaluationConfig
from looped.config.unread_settings import not_read_under
from looped.errors import UserError
from looped.inference.cost import Cost
from looped.inference.generate import generate
from looped.inference.loop_rollout import LoopRollout
from looped.inference.rollout import ROLLOUTS, rollout_of
from looped.models.build import build
from looped.objectives import build_objective, objective_class
from looped.objectives.base import rows_of_batch, token_losses
from looped.rng import StepRandom

SMALL = {"model.width": 16, "model.num_heads": 2, "denoise.cond_width": 8, "denoise.target.dim": 4}
NEEDS = {"blockwise": {"blocks.num": 2, "model.num_core_layers": 2},
         "noprop-dt": {"blocks.num": 2, "model.num_core_layers": 2},
         "forward-forward": {"model.num_prelude_layers": 0, "model.num_coda_layers": 0, "model.injection": "none"}}
IMAGES = {"images.source": "digits", "denoise.context": "inject"}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_run_as_the_table_says(name):
    kind = {} if "text" in RULES[name].kinds else IMAGES
    config = load_config(None, SMALL | kind | NEEDS.get(name, {}) | {"objective": name})
    assert objective_class(config).rollout == RULES[name].rollout
    assert RULES[name].rollout in ROLLOUTS


def objective_of(rule):
    config = load_config(None, SMALL | {"objective": rule})
    return build_objective(config, build(config, 20))


@pytest.mark.parametrize(("ask", "why"), [
    (lambda rollout: rollout.answers(None, [1], EvaluationConfig(), None),
     "objective masked answers no problems; choose a run of puzzles"),
    (lambda rollout: rollout.first_logits(None, None), "objective masked predicts no token from those before it"),
    (lambda rollout: rollout.sampled_cost(1, 2), "objective masked has no solver to sample; choose denoise")])
def test_what_means_nothing_is_refused(ask, why):
    with pytest.raises(UserError, match=why):
        ask(rollout_of(objective_of("masked")))


def test_damped_steps_are_those_of_the_likelihood_too():
    """On text as on problems, so that the loop of a fixed point does not cycle around it."""
    config = load_config(None, SMALL | {"objective": "fixed-point", "recurrence.damping": 0.5,
                                        "model.state_init": "zero"})
    objective, random = build_objective(config, build(config, 20)).eval(), StepRandom(0, 0, count=2)
    tokens = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0))
    model, rows = objective.model, objective.ask(tokens)
    with torch.no_grad():
        (_, first, _), (_, second, _) = rollout_of(objective).losses(tokens, [1, 2], random)
        e = model.encode(rows.inputs, rows_of_batch(rows))
        state = 0.5 * model.step(torch.zeros_like(e), e, None, rows_of_batch(rows))
        torch.testing.assert_close(first, token_losses(model.decode(state, rows_of_batch(rows)), rows.targets))
        state = 0.5 * state + 0.5 * model.step(state, e, None, rows_of_batch(rows))
        torch.testing.assert_close(second, token_losses(model.decode(state, rows_of_batch(rows)), rows.targets))


def test_a_single_pass_is_never_damped():
    config = load_config(None, SMALL | {"objective": "ar", "recurrence.damping": 0.5})
    assert build_objective(config, build(config, 20)).damping == 0
    assert not_read_under(config, "recurrence.damping")


def test_a_rollout_of_ones_own_answers_writes_and_costs():
    """Twice as many steps as asked."""
    class Twice(LoopRollout):
        def losses(self, rows, depths, random):
            return [(depth // 2, *rest) for depth, *rest in super().losses(rows, [2 * d for d in depths], random)]

        def likelihood_cost(self, depth):
            return super().likelihood_cost(2 * depth)

    ours, theirs = objective_of("full"), objective_of("full")
    ours.rollout = Twice
    rows, random = torch.arange(12).view(2, 6), StepRandom(0, 0, count=2)
    with torch.no_grad():
        (_, doubled, _), = rollout_of(ours).losses(rows, [2], random)
        (_, plain, _), = rollout_of(theirs).losses(rows, [4], random)
    assert torch.equal(doubled, plain)
    assert rollout_of(ours).likelihood_cost(2) == rollout_of(theirs).likelihood_cost(4) != Cost(0, ())
    assert generate(ours, rows, num_tokens=2, depth=1).shape == (2, 2)
