"""Replacements of a linear map from outside take part: LoRA, parametrizations, hooks, biases, anywhere."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from looped.config import Config
from looped.errors import UserError
from looped.models.build import build
from looped.nn.layers import FeedForward, Rotary, TransformerLayer
from looped.nn.masks import Causal
from looped.nn.projection import cast_for, is_plain
from looped.nn.rows import Rows
from looped.objectives import build_objective
from looped.rng import StepRandom

PLACES = ["recurrence.core.blocks.0.layers.0.attn.out", "recurrence.core.blocks.0.layers.0.mlp.out",
          "recurrence.core.blocks.0.layers.0.attn.q", "recurrence.core.blocks.0.layers.0.attn.k",
          "recurrence.core.blocks.0.layers.0.attn.v", "recurrence.core.blocks.0.layers.0.mlp.in_",
          "prelude.0.attn.out", "coda.0.mlp.out", "embed"]
TOKENS = torch.arange(14).view(2, 7)


class LoRA(nn.Module):
    """`base(x) + B A x`, in the place of a Linear or an Embedding (Hu et al. 2021), with B away from zero."""

    def __init__(self, base: nn.Module, rank: int = 2):
        super().__init__()
        self.base = base
        self.lookup = isinstance(base, nn.Embedding)
        rows, columns = base.weight.shape
        self.a = nn.Parameter(0.3 * torch.randn(columns if not self.lookup else rows, rank))
        self.b = nn.Parameter(0.3 * torch.randn(rank, rows if not self.lookup else columns))

    @property
    def weight(self):
        """As in peft: the frozen base's."""
        return self.base.weight

    def forward(self, x):
        return self.base(x) + (self.a[x] if self.lookup else x @ self.a) @ self.b


def lora(module):
    return LoRA(module)


def parametrized(module):
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    return parametrize.register_parametrization(module, "weight", Halved())


def hooked(module):
    module.register_forward_hook(lambda module, args, out: out / 2)
    return module


def own_forward(module):
    inner = module.forward
    module.forward = lambda x: inner(x) / 2
    return module


def biased(module):
    module.bias = nn.Parameter(torch.ones(module.out_features))
    return module


def model_of(objective="full", **changes):
    config = Config().replace(objective=objective, **{
        "model.width": 16, "model.num_heads": 2, "model.num_prelude_layers": 1, "model.num_core_layers": 1,
        "model.num_coda_layers": 1, "model.state_init": "zero", "recurrence.mean": 2, "data.length": 6,
        "evaluation.prompt_length": 3, "training.sample_every": 0} | changes)
    return build_objective(config, build(config, 20))


def loss_of(objective):
    return objective(TOKENS, StepRandom(0, 0, count=len(TOKENS))).value


def changed(objective, place, change):
    parent, name = place.rpartition(".")[::2]
    parent = objective.model.get_submodule(parent)
    torch.manual_seed(0)
    setattr(parent, name, change(getattr(parent, name)))
    return objective


def merged(objective, place):
    """The same in one weight: what the replaced module stands for."""
    plain, module = copy.deepcopy(objective), objective.model.get_submodule(place)
    base = module.base
    delta = (module.a @ module.b) if module.lookup else (module.a @ module.b).T
    with torch.no_grad():
        base = copy.deepcopy(base)
        base.weight += delta
    parent, name = place.rpartition(".")[::2]
    setattr(plain.model.get_submodule(parent), name, base)
    return plain


RULES = [("full", {}), ("full", {"model.tie_embeddings": False}), ("denoise", {}),
         ("denoise", {"model.tie_embeddings": False})]


@pytest.mark.parametrize(("rule", "changes"), RULES)
@pytest.mark.parametrize("place", [*PLACES, "head"])
def test_lora_counts_as_the_weight_it_stands_for_in_loss_and_logits(rule, changes, place):
    if place == "head" and not changes:
        pytest.skip("a tied head is the embedding")
    torch.manual_seed(0)
    objective = model_of(rule, **changes)
    before = loss_of(objective).item()
    changed(objective, place, lora)
    same = merged(objective, place)
    torch.testing.assert_close(loss_of(objective), loss_of(same), rtol=1e-5, atol=1e-6)
    assert abs(loss_of(objective).item() - before) > 1e-5  # it has an effect
    state = torch.randn(2, 6, 16)
    torch.testing.assert_close(objective.model.decode(state), same.model.decode(state), rtol=1e-4, atol=1e-5)
    loss_of(objective).backward()
    assert objective.model.get_submodule(place).b.grad.abs().sum() > 0


@pytest.mark.parametrize("change", [parametrized, hooked, own_forward, biased], ids=lambda change: change.__name__)
@pytest.mark.parametrize("gated", [False, True])
def test_what_is_put_onto_an_output_projection_takes_part(change, gated):
    torch.manual_seed(0)
    mlp, x = FeedForward(8, 12), torch.randn(2, 3, 8)
    gate = torch.randn(2, 1, 8) if gated else None
    plain = mlp(x, gate=gate)
    change(mlp.out)
    wanted = plain + (1 if gate is None else gate) if change is biased else plain / 2
    torch.testing.assert_close(mlp(x, gate=gate), wanted)


def test_a_plain_projection_keeps_its_lean_form():
    assert is_plain(nn.Linear(2, 2, bias=False))
    assert is_plain(nn.Embedding(2, 2))
    for change in (lora, parametrized, hooked, own_forward, biased):
        assert not is_plain(change(nn.Linear(2, 2, bias=False))), change.__name__


@pytest.mark.parametrize("change", [lambda module: module, lora, hooked])
def test_a_layer_compiles_into_one_graph_with_and_without_what_was_put_in(change, unchecked):
    torch._dynamo.reset()
    layer = TransformerLayer(8, 2, 12)
    layer.mlp.out, layer.attn.out = change(layer.mlp.out), change(layer.attn.out)
    x, rows = torch.randn(2, 3, 8), Rows(mask=Causal(), rotation=Rotary(4)(torch.arange(3)))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, None, rows), layer(x, None, rows))


def test_the_weight_of_a_head_that_is_more_is_refused():
    objective = changed(model_of(**{"model.tie_embeddings": False}), "head", lora)
    with pytest.raises(UserError, match="the head is a LoRA"):
        objective.model.head_weight  # noqa: B018


def test_inputs_are_not_cast_to_a_quantised_weight():
    class Packed(nn.Module):
        weight = torch.zeros(2, 2, dtype=torch.int8)

    x = torch.randn(2, 2, dtype=torch.float64)
    assert cast_for(Packed(), x).dtype == torch.float32
    assert cast_for(nn.Linear(2, 2).half(), x).dtype == torch.float16


@pytest.mark.parametrize("target", ["attn.out", "mlp.out", "mlp.in_", "head"])
def test_the_lora_of_peft_trains_what_it_is_put_on(target):
    peft = pytest.importorskip("peft")
    objective = model_of(**{"model.tie_embeddings": False})
    before = loss_of(objective).item()
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False), objective.model)
    objective.model = adapted
    assert abs(loss_of(objective).item() - before) > 1e-5
    loss_of(objective).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0
               for name, weight in adapted.named_parameters() if "lora_" in name)
