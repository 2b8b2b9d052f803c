"""The settings of what happens between loop steps: they begin as the plain loop, every unrolled rule trains them, and
training, evaluation, early exits and generation tell the core the same steps."""

import math

import pytest
import torch
from torch._dynamo.utils import counters

from looped.config import load_config
from looped.config.unread_settings import unread
from looped.cost.counts import count
from looped.errors import UserError
from looped.hub.families import FAMILIES
from looped.inference.loop_rollout import LoopRollout, read_on
from looped.inference.padding import Padding, Reading
from looped.models.build import build
from looped.nn.blocks import Core
from looped.nn.cache import Cache
from looped.nn.layers import Plain
from looped.nn.rows import Rows
from looped.objectives import build_objective
from looped.objectives.leaks import check_core
from looped.objectives.step_losses import Alike
from looped.rng import StepRandom

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

VOCAB = 30
SMALL = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "recurrence.mean": 4,
         "recurrence.backprop": 3, "supervision.segments": 2, "fixed_point.max_steps": 4}
ADD, TOLD = {"model.step_embedding": "add"}, {"model.step_embedding": "modulate"}
STREAMS, DYNAMIC = {"model.streams": 4}, {"model.streams": 2, "model.stream_mixing": "dynamic"}
UPDATE, BRANCHES = {"model.loop_scale": "update"}, {"model.loop_scale": "branches"}
ALL = {"everything": TOLD | UPDATE | DYNAMIC, "add": ADD | BRANCHES | STREAMS}
FRESH = {"add": ADD, "modulate": TOLD, "streams": STREAMS, "dynamic": DYNAMIC, "both": TOLD | DYNAMIC}
UNROLLED = ("full", "truncated", "progressive", "one-step")


def make(moved=True, **flags):
    """(rule in float64, config); moved: with other weights of the boundary than at the start."""
    config = load_config(None, SMALL | {"objective": "full"} | flags)
    rule = build_objective(config, build(config, VOCAB)).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in rule.named_parameters():
            if moved and (".boundary." in name or ".modulation." in name):
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return rule.eval(), config


def text(length=9):
    return torch.randint(VOCAB, (3, length), generator=torch.Generator().manual_seed(0))


def draw(step=0):
    return StepRandom(0, step, count=3)


def states_by_hand(model, tokens, depth, noise):
    e = model.encode(tokens)
    state = model.initial_state(e, noise)
    for index in range(depth):
        state = model.step(state, e, None, Rows(step=index))
        yield state


@pytest.mark.parametrize("flags", FRESH.values(), ids=FRESH)
def test_a_fresh_boundary_leaves_every_weight_and_every_loss_of_the_plain_model_as_it_is(flags):
    rule, _ = make(False, **flags)
    plain, _ = make()
    theirs = dict(rule.named_parameters())
    assert all(torch.equal(theirs[name], weight) for name, weight in plain.named_parameters())
    for step in range(2):
        assert torch.equal(rule(text(), draw(step)).value, plain(text(), draw(step)).value)
    moved, _ = make(**flags)  # the control
    assert not torch.equal(moved(text(), draw()).value, plain(text(), draw()).value)


@pytest.mark.parametrize("flags", [ADD, TOLD], ids=["add", "modulate"])
def test_a_single_pass_is_that_of_the_plain_model_for_any_weights_of_a_step_embedding(flags):
    (rule, _), (plain, _) = make(**flags), make()
    noise = draw().normal("state", (9, 16)).double()
    assert torch.equal(rule.model(text(), 1, noise=noise), plain.model(text(), 1, noise=noise))
    assert not torch.equal(rule.model(text(), 2, noise=noise), plain.model(text(), 2, noise=noise))


def test_branches_are_divided_by_the_trained_steps_and_start_as_if_the_core_ran_once():
    rule, config = make(**BRANCHES)
    plain, _ = make()
    layers = [each.model.recurrence.core.blocks[0].layers[0] for each in (rule, plain)]
    around = config.model.num_prelude_layers + config.model.num_coda_layers
    ratio = math.sqrt((around + config.recurrence.mean) / (around + 1))
    for ours, theirs in zip(*(each.mlp.out.weight for each in layers), strict=True):
        torch.testing.assert_close(ours, ratio * theirs)
    plain.load_state_dict(rule.state_dict())
    with torch.no_grad():
        for branch in (layers[1].attn, layers[1].mlp):
            branch.out.weight /= config.recurrence.mean
    torch.testing.assert_close(rule(text(), draw()).value, plain(text(), draw()).value)


@pytest.mark.parametrize("objective", UNROLLED)
@pytest.mark.parametrize("flags", ALL.values(), ids=ALL)
def test_every_unrolled_rule_trains_every_weight_of_the_boundary(objective, flags):
    rule, _ = make(objective=objective, **flags)
    rule.train()(text(), draw()).value.backward()
    for name, weight in rule.named_parameters():
        assert weight.grad.abs().sum() > 0, name


def test_a_fixed_point_is_found_in_several_streams():
    pytest.importorskip("torchdeq")
    rule, _ = make(objective="fixed-point", **DYNAMIC, **UPDATE)
    rule.train()(text(), draw()).value.backward()
    assert rule.model.recurrence.boundary.parts[1].read.grad.abs().sum() > 0


@pytest.mark.parametrize("flags", ALL.values(), ids=ALL)
def test_training_evaluation_and_early_exits_tell_the_core_the_same_steps(flags):
    rule, _ = make(**flags)
    model, batch = rule.model, rule.ask(text())
    noise = draw().normal("state", (8, 16)).double()
    by_hand = list(states_by_hand(model, batch.inputs, 5, noise))
    torch.testing.assert_close(model.unroll(model.encode(batch.inputs), no_grad=3, grad=2, noise=noise), by_hand[-1])
    losses = LoopRollout(rule).losses(text(), [2, 5], draw())
    for depth, found, _ in losses:
        own = Alike(model, batch, Rows(), rule.config).read(by_hand[depth - 1])
        torch.testing.assert_close(found, own.to(found.dtype))
    for number, (state, _) in enumerate(LoopRollout(rule).steps(batch, 5, draw()), start=1):
        again = list(states_by_hand(model, batch.inputs, number, noise))[-1]
        torch.testing.assert_close(state, again, rtol=1e-4, atol=1e-4)
    per_row = torch.tensor([2, 5, 3])
    rows = model.unroll(model.encode(batch.inputs), no_grad=per_row - 1, grad=torch.ones_like(per_row), noise=noise)
    torch.testing.assert_close(rows, torch.stack([by_hand[depth - 1][i] for i, depth in enumerate(per_row)]))


def test_the_segments_of_one_step_count_on_from_one_another(monkeypatch):
    rule, config = make(objective="one-step", **TOLD, **{"supervision.segments": 3, "supervision.steps": 2})
    told, step = [], rule.model.recurrence.step
    monkeypatch.setattr(rule.model.recurrence, "step", lambda *args, index, **named: (
        told.append(index), step(*args, index=index, **named))[1])
    rule(text(), draw())
    assert told == list(range(config.main_depth)) == list(range(9))


@pytest.mark.parametrize("flags", ALL.values(), ids=ALL)
def test_a_text_read_in_pieces_with_a_cache_gets_the_logits_of_the_whole(flags):
    rule, _ = make(**flags)
    tokens, padding, cache = text(), Padding(None, 9), Cache()

    def read(piece, first, cache):
        state, rows = read_on(rule.model, Reading(piece, 6, padding, first, cache), draw, 0.0)
        return rule.model.decode(state, rows)

    pieces = [read(tokens[:, :5], 0, cache), read(tokens[:, 5:], 5, cache)]
    torch.testing.assert_close(torch.cat(pieces, 1), read(tokens, 0, None))


def test_a_norm_after_each_pass_is_the_last_one_only_if_the_state_is_the_pass():
    normed = {"model.loop_norm": "each-pass", "model.num_coda_layers": 0}
    for flags, last in ((ADD, True), ({}, True), (STREAMS, False), (UPDATE, False)):
        assert isinstance(make(**flags, **normed)[0].model.norm, Plain) == last


@pytest.mark.parametrize(("flags", "said"), [
    ({"objective": "fixed-point"} | TOLD, "the solver of fixed-point seeks one state for all steps; set it to none"),
    (TOLD | {"model.block": "postnorm"}, "step_embedding modulate needs norms before the branches"),
    (BRANCHES | {"model.core": "gated_core.GatedCore"}, "core gated_core.GatedCore has none; set loop_scale to update"),
    ({"model.streams": 0}, "model.streams")])
def test_settings_that_do_not_fit_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        load_config(None, SMALL | {"objective": "full"} | flags)


@pytest.mark.parametrize(("flags", "under"), [
    ({"objective": "denoise"}, "objective denoise"), ({"objective": "masked"}, "objective masked"),
    ({"objective": "ar"}, "objective ar")])
def test_rules_without_a_loop_say_so_and_build_the_model_without(flags, under):
    between = TOLD | UPDATE | DYNAMIC
    config = load_config(None, SMALL | flags | between)
    assert unread(config, between) == dict.fromkeys(between, under)
    plain = build(load_config(None, SMALL | flags), VOCAB)
    assert [name for name, _ in build(config, VOCAB).named_parameters()] == [
        name for name, _ in plain.named_parameters()]


def test_settings_without_effect_for_want_of_others_are_named():
    single = {"objective": "full", "recurrence.mean": 1, "model.stream_mixing": "dynamic"}
    config = load_config(None, SMALL | single | UPDATE)
    assert unread(config, ["model.stream_mixing", "model.loop_scale"]) == {
        "model.stream_mixing": "model.streams 1", "model.loop_scale": "a trained depth of one step"}


def test_other_layouts_refuse_a_boundary_by_the_name_of_its_setting():
    family = next(each for each in FAMILIES if each.name == "llama")
    config = load_config(None, {"objective": "full", "model.preset": "llama", "model.injection": "none",
                                "model.state_init": "embedding"} | STREAMS)
    with pytest.raises(UserError, match="streams is 4, but a model of the family llama has 1"):
        family.written(config, VOCAB, 4)


@pytest.mark.parametrize(("flags", "weights"), [
    (STREAMS, 4 + 4 + 16 + 4), (DYNAMIC, 2 + 2 + 4 + 2 + 4 * 16 + 4), (ADD, 16 * 16), (TOLD, 6 * 16 * 16), (UPDATE, 0)])
def test_a_boundary_has_so_many_weights(flags, weights):
    def size(rule):
        return sum(weight.numel() for weight in rule.parameters())

    assert size(make(**flags)[0]) == size(make()[0]) + weights


def test_a_boundary_counts_in_the_traced_flops_and_not_in_layer_forwards():
    config = load_config(None, SMALL | {"objective": "full", "recurrence.mean": 2, "model.num_prelude_layers": 0,
                                        "model.num_coda_layers": 0, "data.length": 32, "training.batch_size": 2})
    plain, more = count(config, VOCAB), count(config.replace(**TOLD, **DYNAMIC), VOCAB)
    # Forward, 2 a product: modulation for 2 sequences, and for 64 tokens 2 streams with 4 outputs of width 16 and the
    # mixing of 2 streams, at each of 2 steps.
    at_least = 2 * 2 * (2 * 16 * 96 + 64 * 2 * (4 * 16 + 2 * 16))
    assert plain.forward_flops + at_least <= more.forward_flops < 1.5 * plain.forward_flops
    assert more.layer_forwards == plain.layer_forwards


class Own(torch.nn.Module):
    """A core with attention of its own, which heeds the mask or not."""

    def __init__(self, heeds):
        super().__init__()
        self.heeds = heeds

    def forward(self, state, e, cond, rows):
        place = torch.arange(state.shape[1])
        seen = place.view(-1, 1) >= place if self.heeds else torch.ones(len(place), len(place))
        return torch.tanh(seen.to(state) @ state + e)


@pytest.mark.parametrize("heeds", [True, False])
def test_a_core_between_streams_is_still_tested_for_leaks(heeds):
    rule, _ = make(**STREAMS, **UPDATE)
    rule.model.recurrence.core = Core(Own(heeds))
    if heeds:
        check_core(rule, lambda: rule(text(), draw()))
        return
    with pytest.raises(UserError, match="lets row"):
        check_core(rule, lambda: rule(text(), draw()))


@pytest.mark.slow  # torch.compile
def test_one_compiled_core_serves_every_step():
    rule, _ = make(**TOLD, **DYNAMIC)
    plain, _ = make(**TOLD, **DYNAMIC)
    counters.clear()
    rule.model.compile_step(backend="aot_eager", fullgraph=True)
    noise = draw().normal("state", (9, 16)).double()
    with torch.no_grad():
        torch.testing.assert_close(rule.model(text(), 6, noise=noise), plain.model(text(), 6, noise=noise))
    assert counters["stats"]["unique_graphs"] == 1


TOGETHER = {"model.latent_updates": 2, "model.streams": 2, "model.stream_mixing": "dynamic",
            "model.step_embedding": "add", "recurrence.state_noise": 0.1, "model.exit_gate": True}


@pytest.mark.parametrize("flags", [
    {"objective": "full"}, {"objective": "full", "recurrence.loss_on": "gate"},
    {"objective": "full", "recurrence.loss_on": "distil"}, {"objective": "one-step"},
    {"objective": "truncated", "recurrence.backprop": 2}], ids=str)
def test_two_states_in_streams_with_noise_and_a_step_embedding_train_and_run(flags):
    """All that lies between two steps at once: every part learns, and evaluation runs the same loop."""
    rule, _ = make(**TOGETHER | {"model.state_init": "vector"} | flags)
    rule.train()(text(), draw()).value.backward()
    streams = rule.model.recurrence.boundary.parts[-1]
    assert streams.read.grad.abs().sum() > 0
    assert rule.model.embed.weight.grad.abs().sum() > 0
    rule.eval()
    [(_, two, _), (_, five, _)] = LoopRollout(rule).losses(text(), [2, 5], draw())
    model, batch = rule.model, rule.ask(text())
    state = model.unroll(model.encode(batch.inputs), grad=5)
    own = Alike(model, batch, Rows(), rule.config).read(state)
    torch.testing.assert_close(five, own.to(five.dtype))
    assert not torch.allclose(two, five)
