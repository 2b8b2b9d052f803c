"""The attention backend is checked before training starts; a run is evaluated on a device of another backend."""

from types import SimpleNamespace

import pytest
import torch

from looped.errors import UserError
from looped.nn import attention, backends
from looped.nn.layers import Attention
from looped.training.processes import check_attention, first_backend
from looped.training.runs import load_run
from looped.training.train import train


@pytest.mark.parametrize(("name", "why"), [
    ("xformers", "xformers' attention runs on cuda, not on cpu"), ("flash", "flash attention runs on cuda, not on cpu"),
    ("cudnn", "cudnn attention runs on cuda, not on cpu"), ("flex", "flex attention has no backward pass on cpu")])
def test_a_backend_that_cannot_train_here_is_refused_before_a_folder_is_made(name, why, tiny, tmp_path):
    with pytest.raises(UserError) as error:
        train(tiny(**{"model.attention": name}), tmp_path / "run")
    assert str(error.value) == f"model.attention {name} cannot train here: {why}; set it to auto"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_the_check_asks_for_training_in_the_runs_precision_and_head_dim(precision, dtype, tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(backends, "reason_not", lambda name, **case: asked.append((name, case)) or "")
    accelerator = SimpleNamespace(device=torch.device("cuda:1"), mixed_precision=precision)
    check_attention(tiny(**{"model.attention": "flash", "model.width": 48, "model.num_heads": 2}), accelerator)
    (name, case), = asked
    assert name == "flash"
    assert (case["device"], case["dtype"], case["head_dim"], case["needs_gradient"]) == (
        accelerator.device, dtype, 24, True)


def test_a_run_on_cuda_begins_with_what_keeps_xformers_from_it(tiny, monkeypatch):
    absent = "xformers 1.2 is built for CUDA 12.8 and torch brings CUDA 99.0; pip install another"
    monkeypatch.setattr(backends, "_loaded", lambda: (None, absent))
    attention._warn_once.cache_clear()
    accelerator = SimpleNamespace(device=torch.device("cuda"), mixed_precision="bf16")
    with pytest.warns(UserWarning, match=f"^attention runs without xformers, .*: {absent}$") as said:
        assert [first_backend(tiny(), accelerator) for _ in range(2)] == ["sdpa", "sdpa"]
    assert len(said) == 1


def test_that_notice_is_in_the_log_of_the_run_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("looped.training.run_messages.first_backend", lambda config, accelerator: first_backend(
        config, SimpleNamespace(device=torch.device("cuda"), mixed_precision="bf16")))
    monkeypatch.setattr(backends, "_loaded", lambda: (None, "not here"))
    attention._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="attention runs without xformers"):
        train(tiny(**{"training.budget": 2}), tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "train.log").read_text().count("notice: attention runs without xformers") == 1


def test_a_run_may_be_loaded_with_another_backend(tiny, tmp_path):
    train(tiny(**{"training.budget": 1}), tmp_path / "run", quiet=True)
    model = load_run(tmp_path / "run", settings={"model.attention": "flex"}).objective.model
    assert {module.backend for module in model.modules() if isinstance(module, Attention)} == {"flex"}
