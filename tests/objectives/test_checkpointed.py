"""Checkpointed layers: the same loss and the same gradients, bit for bit, under every rule."""

import pytest
import torch

from looped.config import load_config
from looped.models.build import build
from looped.nn.layers import TransformerLayer
from looped.objectives import build_objective
from looped.rng import StepRandom

SMALL = {"model.width": 16, "model.num_heads": 2, "denoise.target.dim": 4, "denoise.cond_width": 8, "data.length": 8,
         "evaluation.prompt_length": 4, "recurrence.mean": 3, "recurrence.backprop": 2}
RULES = [{"objective": "full"}, {"objective": "truncated"}, {"objective": "ar"}, {"denoise.context": "inject"},
         {"denoise.context": "concat"}, {"denoise.context": "context"}, {"model.block": "sandwich"},
         {"denoise.context": "concat", "denoise.block_size": 4},
         {"objective": "blockwise", "blocks.num": 2, "blocks.shared": "frozen"}]


def gradients(**settings):
    config = load_config(None, SMALL | settings)
    objective = build_objective(config, build(config, 30))
    with torch.no_grad():  # a modulation that starts at zero would hide the level
        for name, parameter in objective.named_parameters():
            if "modulation" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.1)
    tokens = torch.randint(30, (4, 9), generator=torch.Generator().manual_seed(0))
    loss = objective(tokens, StepRandom(0, 0, count=4)).value
    loss.backward()
    return [loss.detach(), *(p.grad for p in objective.parameters() if p.grad is not None)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradients_are_bitwise_the_same(rule, monkeypatch):
    runs, run = [], TransformerLayer._run

    def counted(self, *args, **kwargs):
        runs.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(TransformerLayer, "_run", counted)
    plain, once = gradients(**rule), len(runs)
    checkpointed = gradients(**rule, **{"training.checkpoint_activations": True})
    assert len(runs) > 2 * once  # layers ran again
    assert len(plain) == len(checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_nothing_is_kept_where_nothing_is_trained():
    config = load_config(None, SMALL | {"objective": "full", "model.state_init": "zero",
                                         "training.checkpoint_activations": True})
    model = build(config, 30)
    with torch.no_grad():
        assert not model(torch.zeros(1, 4, dtype=torch.long), 2).requires_grad
