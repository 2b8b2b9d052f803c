"""The public names are enough to put a core or a model of one's own into the toolkit."""

import pytest
import torch
from torch import nn

import looped
from looped.config import load_config
from looped.config.denoise import DenoiseConfig
from looped.diffusion.denoiser import MEMBERS
from looped.objectives import Denoise

V, D, TOKENS = 20, 16, torch.arange(14).view(2, 7)
pytestmark = pytest.mark.usefixtures("unchecked")


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 * D, D)

    def forward(self, state, e, cond=None):
        return torch.tanh(self.linear(torch.cat([state, e], dim=-1)))


class Told(Mine):
    def forward(self, state, e, cond=None, rows=None):
        return super().forward(state, e, cond)


def objective_of():
    config = load_config(None, {"objective": "full", "model.width": D, "model.num_heads": 2, "recurrence.mean": 2,
                                "model.state_init": "zero"})
    return looped.build_objective(config, looped.build(config, V))


def test_the_loop_of_a_language_model_is_compiled_as_settings_say():
    objective, graphs = objective_of(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    objective.model.compile_step(backend=backend)
    objective.model(TOKENS, 2)
    assert graphs


@pytest.mark.parametrize("make", [
    lambda: looped.Config(**{"model.width": 32}), lambda: looped.Config().model_copy(update={"model.width": 32})])
def test_a_config_is_not_made_of_dotted_names(make):
    assert looped.Config().replace(**{"model.width": 32}).model.width == 32
    with pytest.raises(looped.UserError, match=r"'model.width'.*config.replace\(\*\*\{"):
        make()


def test_a_core_of_ones_own_trains_in_the_language_model():
    objective = objective_of()
    objective.model.recurrence.core = looped.Core(Told())
    objective(TOKENS, looped.StepRandom(0, 0, count=2)).value.backward()
    assert objective.model.recurrence.core.blocks[0].linear.weight.grad.abs().sum() > 0
    means = looped.evaluate_depth(objective, TOKENS, [1, 3], bytes_per_token=2.0).means("nats_per_token")
    assert list(means) == [1, 3]


def test_a_core_that_cannot_be_told_of_the_mask_is_refused_with_the_contract():
    objective = objective_of()
    objective.model.recurrence.core = looped.Core(Mine())
    with pytest.raises(looped.UserError, match=r"arguments but 5 were given.* a fourth argument: .*rows\)"):
        objective(TOKENS, looped.StepRandom(0, 0, count=2))


def test_a_type_error_inside_a_core_stays_itself():
    class Broken(nn.Module):
        def forward(self, state, e, cond=None):
            return state + "one"

    with pytest.raises(TypeError, match=r"unsupported operand|must be") as raised:
        looped.RecurrentDepth(looped.Core(Broken()))(torch.ones(1, 2, 3), 1)
    assert "calls a block as (state, e, cond)" in raised.value.__notes__[0]


class Wanting(nn.Module):
    def forward(self, state, e, cond, rows, more):
        return state


class ByName(nn.Module):
    def forward(self, state, e, cond, *, mask):
        return state


@pytest.mark.parametrize(("make", "said"), [
    (lambda: looped.Core(nn.Linear(2, 2)), r"Linear.forward\(input.* cannot be called as \(state, e, cond\)"),
    (lambda: looped.RecurrentDepth(nn.Bilinear(2, 2, 2)), r"Bilinear.forward\(input1.* cannot be called as"),
    (lambda: looped.Core(Wanting()), r"Wanting.forward\(state, e, cond, rows, more\) cannot be called as"),
    (lambda: looped.Core(ByName()), r"ByName.forward\(state, e, cond, \*, mask\) cannot be called as"),
    (lambda: looped.Core(torch.tanh), "a block of the loop must be a Module, got")])
def test_what_cannot_be_called_as_a_block_is_refused_when_the_loop_is_made(make, said):
    with pytest.raises(looped.UserError, match=said):
        make()


class Net(nn.Module):
    """Exactly the members of `LoopedModel`."""

    width, vocab_size = D, V
    num_prelude_layers, core_layers, num_coda_layers = 0, (1,), 0

    def __init__(self):
        super().__init__()
        self.embed, self.core = nn.Embedding(V, D), Told()

    @property
    def head_weight(self):
        return self.embed.weight

    def encode(self, tokens, rows=None):
        return self.embed(tokens)

    def make_context(self, e, kind, rows=None):
        return None

    def step(self, state, e, level=None, rows=None):
        return self.core(state, e)

    def hidden(self, state, rows=None):
        return state

    def decode(self, state, rows=None):
        return state @ self.head_weight.T


def test_a_net_with_the_members_of_looped_model_trains_and_is_sampled_as_a_denoiser():
    torch.manual_seed(0)
    net = Net()
    assert {name for name in vars(Net) if not name.startswith("_")} | {"embed"} == {*MEMBERS}
    objective = Denoise(net, DenoiseConfig(context="inject", bridge="soft"))
    objective(TOKENS, looped.StepRandom(0, 0, count=2)).value.backward()
    assert net.core.linear.weight.grad.abs().sum() > 0
    denoiser, e = objective.denoiser, net.encode(TOKENS)
    levels = looped.schedule("karras", 3, objective.noise)
    z = levels[0].float() * torch.randn(2, 7, denoiser.targets.dim)
    D_hat = looped.SAMPLERS["euler"](lambda z, sigma: denoiser.estimate(denoiser(z, sigma, e)), z, levels)
    assert D_hat.shape == z.shape
    sweep = looped.evaluate_depth(objective, TOKENS, [1, 3], bytes_per_token=2.0)
    assert sweep.means("nats_per_token").keys() == {1, 3}
    assert {row.layer_forwards for row in sweep.rows if row.depth} == {1.0, 3.0}
    assert looped.generate(objective, TOKENS[:, :3], depth=2, num_tokens=4).shape[0] == 2


def test_a_net_with_a_loop_of_its_own_needs_no_more_to_be_sampled():
    net = Net()
    net.recurrence = looped.RecurrentDepth(net.core, state_init="zero")
    objective = Denoise(net, DenoiseConfig(context="inject"))
    assert looped.generate(objective, TOKENS[:, :3], depth=2, num_tokens=4).shape[0] == 2


def test_evidence_in_needs_no_more_of_a_net_and_reads_its_factor_if_it_has_one():
    torch.manual_seed(0)
    net = Net()
    objective = Denoise(net, DenoiseConfig(context="inject", evidence_in=True))
    objective(TOKENS, looped.StepRandom(0, 0, count=2)).value.backward()
    denoiser, sigma = objective.denoiser, torch.full((2,), 1e-2, dtype=torch.float64)
    z = denoiser.target(TOKENS)
    clear = denoiser.expected_embedding(z, denoiser.at(z, sigma))
    torch.testing.assert_close(clear, net.encode(TOKENS), rtol=1e-4, atol=1e-4)
    net.embed_scale = 3.0
    torch.testing.assert_close(denoiser.expected_embedding(z, denoiser.at(z, sigma)), 3 * clear)


@pytest.mark.parametrize("member", MEMBERS)
def test_a_net_that_lacks_a_member_is_refused_when_the_rule_is_made(member, monkeypatch):
    net = Net()
    if member == "embed":
        del net.embed
    else:
        monkeypatch.delattr(Net, member)
    with pytest.raises(looped.UserError, match=f"Net has no {member}, which .* needs; see looped.LoopedModel"):
        Denoise(net, DenoiseConfig(context="inject"))


def test_a_net_without_them_is_refused_by_name():
    with pytest.raises(looped.UserError, match="Linear has no width and no vocab_size and no embed"):
        looped.Denoiser(nn.Linear(2, 2))


def test_text_functions_refuse_a_rule_that_learned_no_text():
    config = load_config(None, {"task.name": "parity", "objective": "full", "model.width": D, "model.num_heads": 2})
    objective = looped.build_objective(config, looped.build(config, V))
    for call in (lambda: looped.evaluate_depth(objective, TOKENS, [1], bytes_per_token=1.0),
                 lambda: looped.token_losses_by_depth(objective, TOKENS, [1]),
                 lambda: looped.losses_with_exits(objective, TOKENS, 2, ["kl"]),
                 lambda: looped.generate(objective, TOKENS, num_tokens=2, depth=1)):
        with pytest.raises(looped.UserError, match="need an objective over text, and this one is over "):
            call()


def test_the_depth_sampler_is_public():
    no_grad, grad = looped.sample_depths(8, 4, looped.StepRandom(0, 3, count=5))
    assert no_grad.shape == grad.shape == (5,)
    assert grad.max() <= 4
