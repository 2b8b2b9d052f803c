"""Frequencies are no weights: a model built without memory has the right ones once it has its weights."""

import pytest
import torch
from torch import nn

from looped.nn.boundary import StepFeatures
from looped.nn.conditioning import LevelEmbedding
from looped.nn.layers import Rotary


def parts():
    return nn.ModuleDict({"rotary": Rotary(16), "level": LevelEmbedding(8), "step": StepFeatures()})


def frequencies(model):
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("frequencies")}


def emptied(model, weights):
    model.to_empty(device="cpu")
    model.load_state_dict(weights)


@pytest.mark.parametrize("load", [emptied, lambda model, weights: model.load_state_dict(weights, assign=True)],
                         ids=["to_empty", "assign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_leaves_the_meta_device_has_its_frequencies(load, dtype):
    plain = parts().to(dtype)
    with torch.device("meta"):
        model = parts().to(dtype)
    assert all(buffer.is_meta for buffer in frequencies(model).values())
    load(model, plain.state_dict())
    assert len(frequencies(model)) == 3
    for name, buffer in frequencies(plain).items():
        assert buffer.dtype == torch.float32
        assert torch.equal(frequencies(model)[name], buffer)
    level = torch.tensor([0.5], dtype=dtype)
    with torch.autocast("cpu", enabled=dtype != torch.float32, dtype=torch.bfloat16):
        assert torch.equal(model["level"](level), plain["level"](level))


def test_weights_without_memory_leave_the_frequencies_there():
    with torch.device("meta"):
        model = parts()
        model.load_state_dict(parts().state_dict(), assign=True)
    assert all(buffer.is_meta for name, buffer in frequencies(model).items() if name.startswith("level"))
