"""A compiled loop step: the same numbers in one graph, and a module like any other, with copies of their own."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel

from looped.config.model import ModelConfig
from looped.models.language import LanguageModel
from looped.nn.blocks import Core
from looped.nn.layers import Rotary, TransformerLayer
from looped.nn.masks import Causal
from looped.nn.recurrence import RecurrentDepth
from looped.nn.rows import Rows

pytestmark = pytest.mark.usefixtures("unchecked")
D = 8
TOKENS = torch.arange(12).view(2, 6)


class Mix(nn.Module):
    def __init__(self, width=D):
        super().__init__()
        self.linear = nn.Linear(2 * width, width)

    def forward(self, state, e, cond=None):
        return torch.tanh(self.linear(torch.cat([state, e], -1)))


def loop_of(width=D):
    torch.manual_seed(0)
    return RecurrentDepth(Core(Mix(width)))


def language_model(**changes):
    torch.manual_seed(0)
    config = ModelConfig(width=16, num_heads=2, num_prelude_layers=1, num_core_layers=1, num_coda_layers=1,
                         state_init="zero", **changes)
    return LanguageModel(config, 32)


MODELS = {"loop": (loop_of, lambda m: m(torch.ones(4, 3, D, dtype=next(m.parameters()).dtype), 3)),
          "language model": (language_model, lambda m: m(TOKENS, 3))}


@pytest.fixture(params=["loop", pytest.param("language model", marks=pytest.mark.slow)])
def compiled(request):
    """(a compiled model, the same uncompiled, how it is run)."""
    make, run = MODELS[request.param]
    model, plain = make(), make()
    settings = {"backend": "aot_eager", "fullgraph": True}
    (model.recurrence if isinstance(model, LanguageModel) else model).compile_step(**settings)
    torch.testing.assert_close(run(model), run(plain))
    return model, plain, run


def altered(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)
    return model


def loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), loaded],
                         ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(compiled, copied):
    model, plain, run = compiled
    other = altered(copied(model))
    theirs = run(altered(copy.deepcopy(plain)))
    torch.testing.assert_close(run(other), theirs)
    torch.testing.assert_close(run(model), run(plain))
    assert not torch.allclose(theirs, run(plain))  # positive control: the weights matter


def test_an_average_of_a_compiled_model_is_the_averages_own(compiled):
    model, plain, run = compiled
    average = AveragedModel(model, avg_fn=lambda mean, new, count: mean)
    altered(model)
    torch.testing.assert_close(run(average.module), run(plain))


def test_a_compiled_model_may_change_its_dtype_and_keeps_its_names(compiled):
    model, plain, run = compiled
    assert list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(run(model.double()), run(plain.double()))


def test_gradients_of_a_compiled_loop_are_those_of_the_plain_one():
    loop, plain, e = loop_of(), loop_of(), torch.ones(4, 3, D)
    loop.compile_step(backend="aot_eager", fullgraph=True)
    depths = {"no_grad": torch.tensor([0, 2, 1, 2]), "grad": 2}
    for model in (loop, plain):
        model.unroll(e, **depths).square().sum().backward()
    for ours, theirs in zip(loop.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.skipif("isolate_recompiles" not in torch.compile.__code__.co_varnames, reason="needs torch 2.13")
def test_several_loops_in_one_process_stay_compiled():
    """With depths by sequence each takes several graphs; torch shares eight among all that run the same code."""
    torch._dynamo.reset()
    for width in range(4, 8):
        loop, e = loop_of(width), torch.ones(5, 3, width)
        loop.compile_step(backend="eager", fullgraph=True)  # fullgraph: beyond the limit it raises
        before = counters["stats"]["unique_graphs"]
        for depths in ({"no_grad": torch.tensor([0, 1, 2, 3, 4]), "grad": 1},
                       {"no_grad": 0, "grad": torch.tensor([1, 3, 2, 4, 2])}):
            loop.unroll(e, **depths)
        assert counters["stats"]["unique_graphs"] > before


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("cond_width", [None, 4])
def test_a_layer_compiles_into_one_graph_in_both_directions(activation, cond_width):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = TransformerLayer(8, 2, 12, activation=activation, cond_width=cond_width)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.3)  # a gate that starts at one would hide its gradient's path
    x, rows = torch.randn(2, 3, 8), Rows(mask=Causal(), rotation=Rotary(4)(torch.arange(3)))
    cond = None if cond_width is None else torch.randn(2, cond_width)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    ours, theirs = compiled(x, cond, rows), layer(x, cond, rows)
    torch.testing.assert_close(ours, theirs)
    pairs = zip(*(torch.autograd.grad(out.square().sum(), list(layer.parameters())) for out in (ours, theirs)),
                strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
