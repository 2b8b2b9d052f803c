"""Deterministic training: the same bits as without it on a CPU, a sentence where no kernel has them, all restored."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from same_runs import assert_same

from looped.errors import UserError
from looped.nn import backends
from looped.nn.attention import Causal
from looped.training.callbacks import Callback
from looped.training.determinism import CUBLAS, deterministic, only_warned
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

ON = {"training.deterministic": True}
RULES = {
    "denoise": {"denoise.noise.distribution": "adaptive", "optim.ema_decay": 0.9},
    "truncated": {"objective": "truncated", "optim.name": "muon", "training.sample_every": 4},
    "gate": {"objective": "full", "model.exit_gate": True, "recurrence.loss_on": "gate"},
    "masked": {"objective": "masked", "masked.cond_width": 8, "evaluation.levels": 4},
    "bf16": {"objective": "full", "training.precision": "bf16"},
}


def process():
    """The state of the process that the setting changes."""
    cudnn = torch.backends.cudnn
    return (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            cudnn.deterministic, cudnn.benchmark)


@pytest.mark.parametrize("rule", RULES)
def test_on_a_cpu_the_setting_changes_no_bit(tmp_path, tiny, rule, capsys):
    before = process()
    train(tiny(**RULES[rule]), tmp_path / "usual")
    assert ", deterministic" not in capsys.readouterr().out
    train(tiny(**RULES[rule], **ON), tmp_path / "run")
    assert ", deterministic" in capsys.readouterr().out
    assert_same(tmp_path / "run", tmp_path / "usual")
    assert process() == before


class Puts(Callback):
    """Runs an operation that no device has a deterministic kernel for."""

    def on_step(self, trainer):
        assert process() == (True, False, True, False)
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


def evaluated(objective, data, config):
    torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    return {"loss": 1.0}


def test_an_operation_without_a_deterministic_kernel_is_named_in_a_sentence(tmp_path, tiny):
    before = process()
    with pytest.raises(UserError, match=r"^training.deterministic is on, and put_ has no deterministic implementation "
                                        r"on this device; turn off what uses it, or set .* to false in a new --run$"):
        train(tiny(**ON), tmp_path / "run", callbacks=[Puts()])
    assert process() == before


@pytest.mark.filterwarnings("ignore:put_ does not have")
def test_an_evaluation_may_use_any_kernel(tmp_path, tiny):
    train(tiny(**ON), tmp_path / "run", evaluate=evaluated)
    train(tiny(), tmp_path / "usual", evaluate=evaluated)
    assert_same(tmp_path / "run", tmp_path / "usual")
    before = process()
    with only_warned():
        assert process() == before


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match=r"^no such thing$"), deterministic(True):
        raise RuntimeError("no such thing")


def test_the_flags_of_the_process_are_restored(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = process()
        with deterministic(True):
            assert process() == (True, False, True, False)
            with only_warned():
                assert process() == (True, True, True, False)
            assert process() == (True, False, True, False)
        with deterministic(False):
            assert process() == before
        assert process() == before == (True, True, False, True)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("value", "started", "why"), [
    (None, False, None), (":16:8", True, None), (None, True, "which was not set when CUDA started; set it to :4096:8"),
    (":8:2", False, "which is ':8:2'; set it to :4096:8 before Python starts")])
def test_cublas_gets_its_variable_before_it_starts(monkeypatch, value, started, why):
    monkeypatch.setenv(CUBLAS, value or "")  # so that it is restored
    if value is None:
        del os.environ[CUBLAS]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    before = process()
    if why is not None:
        with pytest.raises(UserError, match=why), deterministic(True):
            pass
        assert process() == before
        return
    with deterministic(True):
        assert os.environ[CUBLAS] == (value or ":4096:8")


def test_xformers_is_asked_again_under_the_setting(monkeypatch):
    """Its dispatch leaves FlashAttention's backward pass out then, and what it has answered before does not hold."""
    def dispatch(inputs, *rest):
        if torch.are_deterministic_algorithms_enabled():
            raise NotImplementedError("No operator\n`fa2B` is not supported because:\n    it is non-deterministic")
        return SimpleNamespace(NAME="fa2", VARLEN_LSE_PACKED=True)

    fmha = SimpleNamespace(LowerTriangularMask=object, Inputs=dict, _dispatch_fw=dispatch, _dispatch_bw=dispatch)
    monkeypatch.setattr(backends, "xformers_ops", lambda: fmha)
    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: None)
    ask = partial(backends.reason_not, "xformers", Causal(), "cuda", torch.bfloat16, head_dim=4096, needs_gradient=True)
    assert ask() == ""
    with deterministic(True):
        assert "it is non-deterministic" in ask()
    assert ask() == ""
    backends.xformers_operators.cache_clear()
