"""Faults of custom objects in training are one sentence: callbacks, results of a rule, cores."""

import numpy as np
import pytest
import torch
from torch import nn

from looped import UserError, build, load_config, load_run
from looped.config import Config
from looped.config.rules import Rule
from looped.diffusion.samplers import sampler_of
from looped.objectives import Full, Loss, Objective
from looped.training.callbacks import Callback
from looped.training.logs import read_metrics
from looped.training.step_checks import require_loss
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")
TINY = {"model.width": 16, "model.num_heads": 2, "data.max_bytes": 60_000, "data.vocab_size": 300, "data.length": 16,
        "training.budget": 1, "training.batch_size": 2, "evaluation.num_sequences": 2, "evaluation.num_samples": 1,
        "evaluation.prompt_length": 4, "evaluation.sample_length": 2, "objective": "full"}


def tiny() -> Config:
    return load_config(None, TINY)


@pytest.mark.parametrize("given", [lambda trainer: None, Callback], ids=["a function", "a class"])
def test_what_is_no_callback_is_refused(given, tmp_path):
    with pytest.raises(UserError, match=r"a callback must be a Callback, got .*; give an object of a class derived"):
        train(tiny(), tmp_path / "run", callbacks=[given], quiet=True)


def test_callbacks_without_a_list_are_refused(tmp_path):
    with pytest.raises(UserError, match="callbacks must be an Iterable, got a Callback; give a list of them"):
        train(tiny(), tmp_path / "run", callbacks=Callback(), quiet=True)


@pytest.mark.parametrize(("found", "said"), [
    (torch.ones(()), "the result of evaluate must be a dict, got a float32 tensor"), ("4.2", "got a str"),
    ({"nats": "4.2"}, "evaluate returned a str as nats"), ({"nats": torch.ones(2)}, "tensor of shape .* as nats")])
def test_an_evaluation_that_returns_no_numbers_by_name_is_refused(found, said, tmp_path):
    with pytest.raises(UserError, match=f"{said}.*; return numbers by name"):
        train(tiny(), tmp_path / "run", evaluate=lambda *given: found, quiet=True)


def test_an_evaluation_may_return_tensors_and_arrays_of_one_number(tmp_path):
    found = {"a": torch.tensor(0.5), "b": np.float32(0.25), "c": 3}
    train(tiny(), tmp_path / "run", evaluate=lambda *given: found, quiet=True)
    assert {name: read_metrics(tmp_path / "run")[-1][name] for name in found} == {"a": 0.5, "b": 0.25, "c": 3}


def test_data_without_the_members_of_data_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data is a str without train, heldout, .*; give opened data"):
        train(tiny(), tmp_path / "run", data="text", quiet=True)


@pytest.mark.parametrize(("result", "said"), [
    (lambda: Loss(torch.ones(3, requires_grad=True)), r"Full.forward is a float32 tensor of shape \(3,\); return"),
    (lambda: Loss(1.0), "the loss of Full.forward is a float; return the mean over the batch"),
    (lambda: torch.ones(()), r"result of Full.forward must be a Loss, got .*; return looped.objectives.Loss\(value\)"),
    (lambda: Loss(torch.ones(())), "the loss of Full.forward carries no gradient")])
def test_a_rule_that_returns_no_loss_to_train_by_is_refused(result, said):
    config = tiny()
    with pytest.raises(UserError, match=said):
        require_loss(result(), Full(build(config, 300), config.recurrence))


class Unbuilt(Objective):
    """A rule of its declaration alone."""

    rule = Rule("unbuilt", kinds=("text",))


class Costless(Full):
    """A rule without a cost."""

    rule = Rule("costless", kinds=("text",), reads=("recurrence.mean",))
    layer_forwards = Objective.layer_forwards


class Lossless(Costless):
    """A rule without a loss."""

    layer_forwards, forward = Full.layer_forwards, Objective.forward


class Unrolled(Lossless):
    """A rule whose rollout is none."""

    forward, rollout = Full.forward, "lop"


@pytest.mark.parametrize(("rule", "said"), [
    ("Unbuilt", "Unbuilt does not say how it is built from a config; define its method from_config"),
    ("Costless", "Costless does not say what it costs; define its method layer_forwards"),
    ("Lossless", "Lossless has no loss; define its method forward"),
    ("Unrolled", "Unrolled.rollout is 'lop'; set it to loop, own, pixels, solver, unmask, or to a subclass of")])
def test_a_rule_that_lacks_a_part_is_refused_before_its_first_step(rule, said, tmp_path):
    with pytest.raises(UserError, match=said):
        train(tiny().replace(objective=f"test_custom_faults.{rule}"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def no_solver(denoise, z):
    return z


def test_a_function_that_is_no_solver_is_refused_by_its_arguments():
    with pytest.raises(UserError, match=r"no_solver cannot be called as a solver \(.*\); its arguments are"):
        sampler_of("test_custom_faults.no_solver")


def test_a_core_that_cannot_be_constructed_is_named_with_its_arguments():
    with pytest.raises(UserError, match=r"Bad cannot be constructed .*\(width, num_layers, cond_width"):
        build(load_config(None, TINY | {"model.core": "test_custom_faults.Bad"}), 300)


class Bad(nn.Module):
    """A core without arguments."""

    def __init__(self):
        super().__init__()


def test_a_run_is_not_read_on_a_text_that_is_no_data(tmp_path):
    train(tiny(), tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match=r"got .*; of texts make looped.heldout_text\(texts, run.tokenizer\)"):
        load_run(tmp_path / "run", data="hello")
