"""Stages of the loop: a single pass before it begins (`from_share`), other depths after each other (`stages`)."""

import pytest
import torch

from looped.config import load_config
from looped.config.unread_settings import not_read_under
from looped.cost.counts import count
from looped.cost.plan import plan
from looped.errors import UserError
from looped.models.build import build
from looped.objectives import build_objective
from looped.rng import StepRandom
from looped.training import checkpoint as ckpt
from looped.training.logs import read_metrics
from looped.training.train import open_trainer, train

pytestmark = pytest.mark.usefixtures("unchecked")

LATE = {"recurrence.mean": 3, "recurrence.distribution": "fixed", "recurrence.backprop": 2, "optim.ema_decay": 0.9,
        "training.budget": 8, "training.log_every": 1, "training.checkpoint_every": 4,
        "training.keep_checkpoints": 9}


def weights(run, step):
    return ckpt.load_tensors(ckpt.checkpoint_path(run, step), "model")


@pytest.fixture(params=["full", "truncated"])
def config(request, tiny):
    return tiny(objective=request.param, **LATE, **{"recurrence.from_share": 0.5})


def test_before_it_begins_a_step_is_that_of_ar_and_after_that_it_is_not(config):
    late = build_objective(config, build(config, 270)).train()
    plain = config.replace(objective="ar", **{"recurrence.from_share": 0.0})
    ar = build_objective(plain, build(plain, 270)).train()
    ar.load_state_dict(late.state_dict())  # their initial weights differ by the depth that these are scaled for
    tokens = torch.randint(270, (4, 9), generator=torch.Generator().manual_seed(0))
    for spent, same in ((0.0, True), (0.49, True), (0.5, False), (0.9, False)):
        late.before_step(spent)
        for rule in (late, ar):
            rule.zero_grad()
            rule(tokens, StepRandom(0, 0, count=4)).value.backward()
        grads = zip(late.parameters(), ar.parameters(), strict=True)
        assert all(torch.equal(one.grad, other.grad) for one, other in grads) == same


def test_the_steps_of_a_run_are_single_passes_and_then_loops(config, tmp_path):
    train(config, tmp_path / "run", quiet=True)
    lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert [line["num_steps"] for line in lines] == [1, 1, 1, 1, 3, 3, 3, 3]


def test_its_cost_is_that_of_both_parts(config, tmp_path):
    ar, loop = config.replace(objective="ar", **{"recurrence.from_share": 0.0}), config.replace(
        **{"recurrence.from_share": 0.0})
    late, single, looped = (count(each, 270) for each in (config, ar, loop))
    assert late.step_flops == pytest.approx((single.step_flops + looped.step_flops) / 2, rel=1e-9)
    assert late.layer_forwards == pytest.approx((single.layer_forwards + looped.layer_forwards) / 2)
    train(config, tmp_path / "run", quiet=True)
    spent = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"][-1]["layer_forwards"]
    assert spent == pytest.approx(8 * config.training.batch_size * late.layer_forwards)


def test_a_run_that_is_resumed_around_the_beginning_is_the_undisturbed_one(config, tmp_path):
    train(config, tmp_path / "whole", quiet=True)
    for stop in (3, 5):
        run = tmp_path / f"stopped{stop}"
        with open_trainer(config, run, quiet=True) as trainer:
            for _ in range(stop):
                trainer.step()
        train(config, run, quiet=True)
        whole = weights(tmp_path / "whole", 8)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(run, 8).items())


def test_evaluations_before_it_begins_run_the_loop(config, tmp_path):
    with open_trainer(config, tmp_path / "run", quiet=True) as trainer:
        trainer.step()
        trainer.objective.eval()
        assert sum(trainer.objective.depths(trainer.inputs(1, range(1))[1])) == 3
        trainer.objective.train()
        assert sum(trainer.objective.depths(trainer.inputs(1, range(1))[1])) == 1


def test_it_does_not_go_with_a_gate_that_has_one_pass_to_choose():
    with pytest.raises(UserError, match=r"recurrence.from_share 0.2 begins with one; set it to 0"):
        load_config(None, {"objective": "full", "model.exit_gate": True, "recurrence.loss_on": "gate",
                           "recurrence.from_share": 0.2})


def test_it_has_an_effect_under_these_rules_alone():
    for objective in ("full", "truncated", "progressive", "denoise", "ar"):
        for name in ("recurrence.from_share", "recurrence.stages"):
            read = not not_read_under(load_config(None, {"objective": objective}), name)
            assert read == (objective in ("full", "truncated")), (objective, name)


RAMP = {"objective": "truncated", "recurrence.from_share": 0.0, "recurrence.stages": [
    {"until": 0.25, "mean": 1}, {"until": 0.5, "mean": 2, "backprop": 1},
    {"until": 0.75, "distribution": "listed", "depths": {1: 1, 3: 1}}]}


def test_each_stage_has_its_depth_and_reach_and_the_last_is_the_section(config, tmp_path):
    ramp = config.replace(**RAMP)
    train(ramp, tmp_path / "run", quiet=True)
    lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert [line["num_steps"] for line in lines] == [1, 1, 2, 2, 2, 2, 3, 3]  # a half of each batch runs 1 and 3
    objective = build_objective(ramp, build(ramp, 270)).train()
    found = []
    for spent in (0.0, 0.25, 0.5, 0.75):
        objective.before_step(spent)
        found.append(tuple(map(sum, zip(*[[n, k] for n, k in [objective.expected_depths()]], strict=True))))
    assert found == [(0, 1), (1, 1), (0.5, 1.5), (1, 2)]


def test_stages_say_the_same_as_a_share_of_a_single_pass(config, tmp_path):
    staged = config.replace(**{"recurrence.from_share": 0.0, "recurrence.stages": [{"until": 0.5, "mean": 1}]})
    for name, each in (("share", config), ("stages", staged)):
        train(each, tmp_path / name, quiet=True)
    one, other = (weights(tmp_path / name, 8) for name in ("share", "stages"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert count(config, 270).step_flops == pytest.approx(count(staged, 270).step_flops, rel=1e-12)


def test_a_run_in_stages_is_resumed_bit_for_bit_and_its_config_read_back(config, tmp_path):
    ramp = config.replace(**RAMP)
    assert load_config(None, ramp.model_dump(mode="json")) == ramp
    train(ramp, tmp_path / "whole", quiet=True)
    run = tmp_path / "stopped"
    with open_trainer(ramp, run, quiet=True) as trainer:
        for _ in range(5):
            trainer.step()
    train(ramp, run, quiet=True)
    whole = weights(tmp_path / "whole", 8)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(run, 8).items())


@pytest.mark.parametrize("late", [{"recurrence.from_share": 0.5}, {"recurrence.stages": [
    {"until": 0.4, "mean": 1}, {"until": 0.7, "mean": 2}]}], ids=str)
def test_a_budget_in_layer_forwards_has_as_many_steps_as_are_planned(late, tiny, tmp_path):
    """Deep steps spend such a budget faster, so that fewer of a run's steps are deep than their share of it."""
    config = tiny(objective="full", **LATE | {"recurrence.mean": 8} | late | {
        "training.budget_unit": "layer-forwards", "training.budget": 8_000})
    train(config, tmp_path / "run", quiet=True)
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"][-1]
    assert plan(config, 270, devices=1).steps == pytest.approx(steps, abs=1)
    deep = [line["num_steps"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"].count(8)
    assert deep < 0.3 * steps


def test_drawn_depths_have_the_one_at_which_the_loop_is_compared():
    listed = {"objective": "truncated", "recurrence.distribution": "listed", "recurrence.depths": {1: 5, 2: 1}}
    with pytest.raises(UserError, match=r"recurrence.mean 8.*never trained; set it to one of them, as 1"):
        load_config(None, listed | {"recurrence.mean": 8})
    assert load_config(None, listed | {"recurrence.mean": 2}).main_depth == 2


@pytest.mark.parametrize(("stages", "said"), [
    ([{"until": 0.5, "mean": 1}, {"until": 0.4, "mean": 2}], "stages has one until 0.4 after one until 0.5; order"),
    ([{"until": 0.5}], "stages has one until 0.5 that changes nothing; give it a mean"),
    ([{"until": 1.5, "mean": 1}], r"recurrence.stages.*less than 1"),
    ([{"until": 0.5, "distribution": "listed"}], "stages, until 0.5: distribution listed draws from depths"),
    ([{"until": 0.5, "depth": 1}], "recurrence.stages.*depth")])
def test_stages_that_cannot_be_are_refused_in_one_sentence(stages, said):
    with pytest.raises(UserError, match=said):
        load_config(None, {"objective": "full", "recurrence.stages": stages})


def test_stages_and_a_share_of_a_single_pass_are_refused_together():
    with pytest.raises(UserError, match=r"stages and from_share 0.5 both say how training begins"):
        load_config(None, {"objective": "full", "recurrence.from_share": 0.5,
                           "recurrence.stages": [{"until": 0.5, "mean": 2}]})


def test_a_stage_cannot_set_what_its_rule_does_not_read():
    stages = {"recurrence.stages": [{"until": 0.5, "mean": 2, "backprop": 1}]}
    with pytest.raises(UserError, match=r"stages sets backprop until 0.5, which objective full does not read"):
        load_config(None, {"objective": "full"} | stages)
    assert load_config(None, {"objective": "truncated"} | stages).recurrence.stages[0].backprop == 1


def test_every_stage_is_held_to_the_rules_of_the_section():
    for flags, said in (({"objective": "full", "model.exit_gate": True, "recurrence.loss_on": "gate"},
                         "recurrence.mean 1 has only one"),
                        ({"objective": "full", "blocks.num": 2, "model.num_core_layers": 2},
                         "recurrence.mean 1 ends inside a pass")):
        with pytest.raises(UserError, match=said):
            load_config(None, flags | {"recurrence.stages": [{"until": 0.5, "mean": 1}]})


def test_depths_are_read_where_a_stage_draws_from_them():
    listed = {"recurrence.depths": {1: 1, 2: 1}}
    for stages, read in (([], False), ([{"until": 0.5, "distribution": "listed"}], True)):
        config = load_config(None, {"objective": "truncated", "recurrence.stages": stages} | listed)
        assert (not not_read_under(config, "recurrence.depths")) == read
