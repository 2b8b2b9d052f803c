"""A core of several blocks with weights of their own: who takes which step, what it costs, what its settings refuse."""

import pytest
import torch

from looped.config import load_config
from looped.data.task_data import prepare_task
from looped.errors import UserError
from looped.inference.exits import EarlyExit
from looped.inference.loop_rollout import LoopRollout
from looped.inference.rollout import rollout_of
from looped.inference.trajectories import Copies
from looped.models.build import build
from looped.nn.rows import PLAIN, Rows
from looped.objectives import build_objective, trained_depths
from looped.objectives.base import rows_of_batch
from looped.rng import StepRandom

V = 30
SMALL = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 6, "model.state_init": "zero",
         "blocks.num": 3, "blocks.layers": [1, 3, 2], "recurrence.mean": 6}


def make(objective="ar", **flags):
    config = load_config(None, SMALL | {"objective": objective} | flags)
    return config, build_objective(config, build(config, V))


def tokens():
    return torch.randint(V, (3, 9), generator=torch.Generator().manual_seed(0))


def weights_of(block):
    return {name: weight.clone() for name, weight in block.state_dict().items()}


def test_the_end_to_end_twin_applies_the_blocks_in_a_row():
    config, twin = make()
    model, x = twin.model, tokens()[:, :-1]
    e = model.encode(x)
    state, rows = torch.zeros_like(e), model.placed(e, PLAIN)
    for block in model.recurrence.core.blocks:
        state = block(state, e, None, rows)
    by_hand = torch.nn.functional.cross_entropy(model.decode(state).flatten(0, 1), tokens()[:, 1:].flatten())
    loss = twin(tokens(), StepRandom(0, 0, count=3)).value
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert (config.main_depth, trained_depths(config)) == (3, (3, 3))
    assert [len(block.layers) for block in model.recurrence.core.blocks] == [1, 3, 2]


def test_a_loop_takes_the_blocks_in_turn_and_counts_their_layers():
    _, rule = make("full")
    model, e = rule.model, rule.model.encode(tokens()[:, :-1])
    state = model.initial_state(e)
    for step in range(5):
        state = model.step(state, e, None, Rows(block=step % 3))
    torch.testing.assert_close(model.unroll(e, grad=5), state)
    again = model.step(model.unroll(e, grad=4), e, None, Rows(block=0))
    assert not torch.allclose(model.unroll(e, grad=5), again)  # the control
    assert rule.layer_forwards() == 3 * (1 + 2 * 6 + 1)
    assert [rollout_of(rule).likelihood_cost(depth).layer_forwards for depth in (1, 2, 3, 4)] == [3, 6, 8, 9]


@torch.no_grad()
def test_answers_are_looked_for_by_the_blocks_in_turn():
    config, rule = make(**{"task.name": "prefix-sums", "task.difficulty": [6, 6]})
    batch = prepare_task(config.task).train.batch(0, batch_size=2, seed=0)
    stopping = EarlyExit(batch)
    *_, last = LoopRollout(rule).states(Copies(batch, StepRandom(0, 0, count=2)), 4, stopping)
    rows = rows_of_batch(batch)
    torch.testing.assert_close(last, rule.model.unroll(rule.model.encode(batch.inputs, rows), rows, grad=4))


def test_the_first_weights_of_a_block_depend_on_the_seed_and_its_number_alone():
    _, rule = make("full")
    blocks = list(map(weights_of, rule.model.recurrence.core.blocks))
    _, other = make("full", **{"blocks.layers": [3, 1, 2]})
    for name, weight in weights_of(other.model.recurrence.core.blocks[2]).items():
        assert torch.equal(weight, blocks[2][name]), name
    _, same = make("full", **{"blocks.layers": [2, 2, 2]})
    first, second, _ = map(weights_of, same.model.recurrence.core.blocks)
    assert not torch.equal(first["layers.0.attn.out.weight"], second["layers.0.attn.out.weight"])


@pytest.mark.parametrize(("rule", "flags", "why"), [
    ("ar", {"blocks.layers": [3, 3]}, "blocks.num to 2"),
    ("ar", {"blocks.layers": [3, 3, 3]}, "set model.num_core_layers to 9"),
    ("ar", {"blocks.layers": None, "model.num_core_layers": 10}, "set it to 9 or 12"),
    ("ar", {"blocks.layers": None, "model.num_core_layers": 2}, "set it to 3, or"),
    ("full", {"recurrence.mean": 8}, "recurrence.mean 8 ends inside a pass .* set it to 6"),
    ("truncated", {}, "distribution huginn .* set it to fixed"),
    ("truncated", {"recurrence.distribution": "fixed", "recurrence.backprop": 2}, "backprop 2 .* set it to 3"),
    ("progressive", {}, "only one block, but blocks.num is 3"),
    ("one-step", {}, "set blocks.num to 1"),
    ("fixed-point", {}, "set blocks.num to 1"),
])
def test_what_does_not_fit_is_named_in_one_sentence(rule, flags, why):
    with pytest.raises(UserError, match=why) as error:
        load_config(None, SMALL | {"objective": rule} | flags)
    assert "\n" not in str(error.value)


GOLDEN = {"embed.weight": 82.3102718439768, "recurrence.core.blocks.0.injection.mix.weight": 65.18025757520809,
          "coda.0.mlp.out.weight": 44.25340523542036}


def test_one_block_has_the_weights_that_the_tied_loop_has_always_had():
    """Figures of the state before there were several blocks: old runs go on, and old seeds give old results."""
    config = load_config(None, {"objective": "denoise", "model.width": 16, "model.num_heads": 2})
    model = build(config, 40)
    sums = {name: model.get_parameter(name).double().abs().sum().item() for name in GOLDEN}
    assert sums == pytest.approx(GOLDEN, rel=1e-6)
