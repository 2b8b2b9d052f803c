"""Faults of custom objects in training are one sentence: callbacks, results of a rule, cores."""

import pytest
import torch
from torch import nn

from looped import UserError, build, load_config, load_run
from looped.config import Config
from looped.objectives import Full, Loss
from looped.training.callbacks import Callback
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


@pytest.mark.parametrize(("result", "said"), [
    (torch.ones(()), r"the result of Full.forward must be a Loss, got .*; return looped.objectives.Loss\(value\)"),
    (Loss(torch.ones(())), "the loss of Full.forward carries no gradient")])
def test_a_rule_that_returns_no_loss_to_train_by_is_refused(result, said):
    config = tiny()
    with pytest.raises(UserError, match=said):
        require_loss(result, Full(build(config, 300), config.recurrence))


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
