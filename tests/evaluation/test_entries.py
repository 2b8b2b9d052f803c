"""Public functions refuse what they cannot do in one sentence, before anything is computed; a few things just work."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import looped
from looped.config import Config, load_config
from looped.config.denoise import DenoiseConfig
from looped.diffusion.denoiser import Denoiser
from looped.diffusion.noise import LogUniform
from looped.diffusion.samplers import SAMPLERS
from looped.diffusion.schedules import schedule
from looped.errors import UserError
from looped.evaluation.depth_sweep import evaluate_depth
from looped.evaluation.likelihood import losses_by_depth, losses_by_sigma, next_token_losses
from looped.models.build import build
from looped.models.language import LanguageModel
from looped.nn.attention import attention
from looped.nn.blocks import Core
from looped.nn.masks import Causal
from looped.nn.recurrence import RecurrentDepth
from looped.nn.rows import Rows
from looped.objectives import build_objective
from looped.training.train import train

V = 20
TOKENS = torch.arange(14).view(2, 7)
pytestmark = pytest.mark.usefixtures("unchecked")


def made(objective="full", **flags):
    torch.manual_seed(0)
    config = load_config(None, {"objective": objective, "model.width": 16, "model.num_heads": 2, "recurrence.mean": 2,
                                "model.state_init": "zero", "denoise.target.dim": 6, "denoise.cond_width": 8} | flags)
    return build_objective(config, build(config, V))


OBJECTIVE, DENOISE = made(), made("denoise")
MODEL, DENOISER = OBJECTIVE.model, DENOISE.denoiser
CONFIG = load_config(None, {"objective": "full"})
E = torch.randn(2, 6, 16)
Z = torch.randn(2, 6, 6)


def sweep(objective=OBJECTIVE, tokens=TOKENS, depths=(1, 2), **settings):
    return evaluate_depth(objective, tokens, depths, **{"bytes_per_token": 3.0} | settings)


def mixed(change):
    q = torch.randn(2, 3, 2, 4)
    return attention(q, change(q), change(q), Causal())


class Still(nn.Module):
    """A block that changes nothing."""

    def forward(self, state, e, cond=None):
        return state


REFUSED = {
    "no depth": (lambda: sweep(depths=[]), "depths is empty"),
    "depth 0": (lambda: sweep(depths=[0, 1]), "a depth 0 is below 1"),
    "negative depth": (lambda: sweep(depths=[-1]), "a depth -1 is below 1"),
    "fractional depth": (lambda: sweep(depths=[1.5]), "a depth must be a whole number of 1 or more, got 1.5"),
    "one depth": (lambda: sweep(depths=3), r"depths must be a sequence of whole numbers, such as \[1, 2, 4\], got 3"),
    "float tokens": (lambda: sweep(tokens=TOKENS.float()), "got a float32 tensor of shape"),
    "one row": (lambda: sweep(tokens=TOKENS[0]), r"got \(7,\); for one sequence pass tokens.unsqueeze\(0\)"),
    "no rows": (lambda: sweep(tokens=TOKENS[:0]), r"must have the shape \(batch, 2 or more\), got \(0, 7\)"),
    "one column": (lambda: sweep(tokens=TOKENS[:, :1]), r"\(batch, 2 or more\), got \(2, 1\)"),
    "a list": (lambda: sweep(tokens=TOKENS.tolist()), "documents are a list of tensors .* one of them is a list"),
    "no documents": (lambda: sweep(tokens=[]), "documents are a list of tensors .* give at least one"),
    "padding": (lambda: sweep(tokens=TOKENS - 1), "token id -1 is outside the vocabulary, 0 ... 19"),
    "id too large": (lambda: sweep(tokens=TOKENS + V), "token id 20 is outside the vocabulary"),
    "the model": (lambda: sweep(MODEL), "objective must be an Objective, got a LanguageModel; pass run.objective"),
    "the run": (lambda: sweep(SimpleNamespace(objective=OBJECTIVE)), "pass run.objective"),
    "bytes": (lambda: sweep(bytes_per_token=0), "bytes_per_token 0 is not above 0"),
    "batch size": (lambda: sweep(batch_size=0), "batch_size 0 is below 1"),
    "metric": (lambda: sweep().means("nats"), "unknown metric 'nats' by depth; .*nats_per_token"),
    "losses by depth": (lambda: losses_by_depth(MODEL, TOKENS, [1]), "objective must be"),
    "losses by sigma": (lambda: losses_by_sigma(DENOISE, TOKENS + V), "token id 20"),
    "no levels": (lambda: losses_by_sigma(DENOISE, TOKENS, num_levels=0), "num_levels 0 is below 1"),
    "next tokens": (lambda: next_token_losses(OBJECTIVE, TOKENS, 0), "a depth 0 is below 1"),
    "steps": (lambda: MODEL(TOKENS, -1), "num_steps -1 is below 0"),
    "model's ids": (lambda: MODEL(TOKENS + V, 1), "token id 20"),
    "tokens for e": (lambda: MODEL.unroll(TOKENS, grad=1), r"e must be what encode\(tokens\) returns"),
    "ignored noise": (lambda: MODEL(TOKENS, 1, noise=E), "state_init zero draws nothing, so noise= would be ignored"),
    "noise of another shape": (lambda: RecurrentDepth(Core(Still()), state_init="noise")(E, 1, noise=E[:1]),
                               r"noise has the shape \(1, 6, 16\)"),
    "no context of this name": (lambda: MODEL.make_context(E, "concatenate"),
                                "unknown context 'concatenate'; did you mean"),
    "sigma in words": (lambda: DENOISER(Z, "2", E), "sigma '2' is text"),
    "sigma inf": (lambda: DENOISER(Z, float("inf"), E), "sigma inf is not above 0 and finite"),
    "sigma 0": (lambda: DENOISER(Z, 0.0, E), "sigma 0 is not above 0"),
    "a sigma below 0": (lambda: DENOISER(Z, torch.tensor([1.0, -1.0]), E), "sigma -1 is not above 0"),
    "sigmas of another batch": (lambda: DENOISER(Z, torch.ones(3), E), "does not match the leading axes"),
    "a block of one": (lambda: DENOISER.trace(Z, torch.ones(2), E, Rows(block=1)), "this denoiser has one block"),
    "a dict for a config": (lambda: Denoiser(MODEL, {"context": "inject"}), "must be a DenoiseConfig, got a dict"),
    "a path for a config": (lambda: train("configs/smoke.yaml", "nowhere"), "config must be a Config, got a str"),
    "swapped": (lambda: build_objective(MODEL, CONFIG), "config must be a Config, got a LanguageModel"),
    "no model": (lambda: build_objective(CONFIG, V), "model must be a Module, got an int"),
    "no vocabulary": (lambda: build(CONFIG, 0), "vocab_size 0 is below 1"),
    "the whole config": (lambda: LanguageModel(CONFIG, V), "config must be a ModelConfig, got a Config"),
    "numbers for a noise": (lambda: schedule("karras", 3, "log-uniform"), "noise must be a Noise, got"),
    "fractional steps": (lambda: schedule("karras", 2.5, LogUniform(0.1, 10)), "num_steps must be a whole number"),
    "another dtype": (lambda: mixed(lambda t: t.double()), "one floating dtype on one device; got q float32 on cpu"),
    "another device": (lambda: mixed(lambda t: t.to("meta")), "k float32 on meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_sentence(case):
    run, why = REFUSED[case]
    with pytest.raises(UserError, match=why) as error:
        run()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_solver_refuses_logits_in_place_of_an_estimate(name):
    with pytest.raises(UserError, match=r"estimate of z's shape \(2, 6, 6\), got a float32 tensor of shape \(2, 6, 20"):
        SAMPLERS[name](lambda z, sigma: DENOISER(z, sigma, E), Z, torch.tensor([2.0, 1.0, 0.0]),
                       random=torch.Generator())


def test_a_refused_evaluation_leaves_the_mode_of_the_objective():
    objective = made().train()
    with pytest.raises(UserError):
        sweep(objective, depths=[0])
    objective.model.decode = lambda state, rows: state.reshape(-1, 3)  # fails in the middle
    with pytest.raises(Exception, match=r"size|shape"):
        sweep(objective)
    assert objective.training


def test_int32_tokens_and_depths_in_any_order_work():
    ours, theirs = sweep(tokens=TOKENS.int(), depths=(2, 1, 2)), sweep()
    assert ours.means("nats_per_token") == theirs.means("nats_per_token")


@pytest.mark.parametrize("sigma", [2.0, 2, torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64)])
def test_a_denoiser_takes_one_level_for_all_as_solvers_hand_it_on(sigma):
    torch.testing.assert_close(DENOISER(Z, sigma, E), DENOISER(Z, torch.full((2,), 2.0), E))


def test_a_denoiser_without_a_config_has_the_defaults():
    assert Denoiser(MODEL).config == DenoiseConfig()


def test_a_config_made_without_a_file_builds():
    assert isinstance(looped.build(Config(), V), LanguageModel)
