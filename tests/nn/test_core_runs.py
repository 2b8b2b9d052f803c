"""Several runs of the core per step (`model.core_runs`): a step is those runs one by one, under every rule, by the same
weights, and costs what they run.
"""

import math

import pytest
import torch
from torch import nn

from looped import Core, RecurrentDepth
from looped.config import load_config
from looped.cost.block_memory import formula_bytes, memory_config
from looped.cost.counts import count
from looped.data.image_batches import ImageSpec, SoughtImages
from looped.data.images import ImageBatch
from looped.errors import UserError
from looped.inference.rollout import rollout_of
from looped.models.build import build
from looped.nn.cache import Cache
from looped.nn.layers import TransformerLayer
from looped.nn.rows import Rows
from looped.objectives import build_objective
from looped.rng import StepRandom

VOCAB, RUNS = 11, 3
PICTURE = ImageSpec(1, 4, 4, 2)
SMALL = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 2, "model.state_init": "zero",
         "denoise.target.dim": 8, "denoise.cond_width": 8, "masked.cond_width": 8, "supervision.segments": 2,
         "recurrence.mean": 2, "recurrence.distribution": "fixed", "recurrence.backprop": 1, "noprop.dim": 8,
         "fixed_point.solver": "fixed_point_iter", "fixed_point.max_steps": 3, "fixed_point.tol": 0.0}
BLOCKS = {"blocks.num": 2}
IMAGES = {"images.source": "digits", "model.patch_size": 2, "denoise.context": "inject"}
RULES = {
    **{name: {"objective": name} for name in ("full", "ar", "truncated", "one-step", "fixed-point", "masked")},
    "two states": {"objective": "full", "model.latent_updates": 2}, "blocks": {"objective": "full"} | BLOCKS,
    "checkpointed": {"objective": "full", "training.checkpoint_activations": True},
    **{context: {"objective": "denoise", "denoise.context": context} for context in ("inject", "concat", "context")},
    **{f"blockwise, {context}": {"objective": "blockwise", "denoise.context": context} | BLOCKS
       for context in ("inject", "concat")},
    "a carry over blocks": {"objective": "blockwise", "denoise.context": "concat", "denoise.carry": "latent"} | BLOCKS,
    "noprop-dt": {"objective": "noprop-dt"} | BLOCKS | IMAGES, "noprop-ct": {"objective": "noprop-ct"} | IMAGES,
    "images": IMAGES | {"objective": "denoise", "images.goal": "generate", "denoise.weight": "edm",
                        "model.num_prelude_layers": 0, "model.num_coda_layers": 0, "model.injection": "none"}}


def rule_of(runs=RUNS, **flags):
    config = load_config(None, SMALL | {"model.core_runs": runs} | flags)
    images = "images.source" in flags
    return build_objective(config, build(config, 3 if images else VOCAB, PICTURE if images else None)).train()


def text(rows=3, length=7):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def batch_for(flags):
    if "images.source" not in flags:
        return text()
    images = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    if "images.goal" in flags:
        return SoughtImages(images, torch.arange(3), 4)
    return PICTURE.ask(ImageBatch(images, torch.arange(3)))


def of_one_run(rule, **flags):
    """The same weights, by the same names, under one run per step."""
    twin = rule_of(runs=1, **flags)
    twin.load_state_dict(rule.state_dict())
    return twin


def moved(rule):
    """Weights away from their start, where the level changes nothing."""
    for parameter in rule.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return rule


@torch.no_grad()
def test_a_loop_is_that_of_as_many_plain_steps():
    rule = moved(rule_of(objective="full"))
    model, twin = rule.model, of_one_run(rule, objective="full").model
    assert torch.equal(model(text(), 2), twin(text(), 2 * RUNS))
    assert not torch.equal(model(text(), 2), twin(text(), 2))


@torch.no_grad()
def test_one_network_evaluation_of_a_denoiser_is_that_of_as_many_steps_at_its_level():
    flags = {"objective": "denoise", "denoise.context": "inject"}
    rule = moved(rule_of(**flags)).double()
    model, twin = rule.model, of_one_run(rule, **flags).model.double()
    e, level = model.encode(text()), torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    state = torch.randn(3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = state
    for _ in range(RUNS):
        expected = twin.step(expected, e, level)
    assert torch.equal(model.step(state, e, level), expected)
    assert not torch.equal(model.step(state, e, level), model.step(state, e, 2 * level))


@pytest.mark.parametrize("flags", RULES.values(), ids=RULES)
def test_training_costs_the_layers_that_run_and_reaches_every_weight(flags):
    if flags["objective"] == "fixed-point":
        pytest.importorskip("torchdeq")
    rule, runs = rule_of(**flags), []
    for layer in rule.modules():
        if isinstance(layer, TransformerLayer):
            layer.register_forward_hook(lambda *_: runs.append(3 if torch.is_grad_enabled() else 1))
    steps = 32 if "blocks.num" in flags else 2  # of which each trains one block, and half run those above it
    for step in range(steps):
        loss = rule(batch_for(flags), StepRandom(0, step, count=3)).value
        ran_before = len(runs)
        loss.backward()
        del runs[ran_before:]  # layers that are computed again
        rule.after_step()
    drawn = 0.5 if "carry" in str(flags) else 0
    assert rule.layer_forwards() == pytest.approx(sum(runs) / steps, abs=drawn)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rule.parameters() if p.requires_grad)


@pytest.mark.parametrize("context", ["inject", "concat"])
def test_a_run_more_costs_the_flops_of_the_core_and_no_weight(context):
    """The FLOPs of a run are those of a step more of the plain loop, but for the level and the attention to clean rows;
    clean rows run once."""
    def counted(runs, **flags):
        return count(load_config(None, SMALL | {"model.core_runs": runs} | flags), VOCAB)

    flags = {"objective": "denoise", "denoise.context": context}
    one, two, three = (counted(runs, **flags) for runs in (1, 2, 3))
    loop = counted(1, objective="full", **{"recurrence.mean": 3}).step_flops \
        - counted(1, objective="full", **{"recurrence.mean": 2}).step_flops
    assert three.step_flops - two.step_flops == two.step_flops - one.step_flops
    assert 1.0 <= (two.step_flops - one.step_flops) / loop < 1.5
    assert one.parameters == two.parameters == three.parameters
    assert [each.effective_parameters - one.parameters for each in (one, two, three)] == [
        0, one.core_parameters, 2 * one.core_parameters]


@pytest.mark.parametrize("flags", [{"objective": "denoise"}, {"objective": "blockwise"} | BLOCKS], ids=str)
def test_residual_branches_start_as_small_as_the_runs_make_the_path_long(flags):
    """Output projections start at a standard deviation of one over the root of twice the layers on the path."""
    def std(runs):
        weights = [layer.attn.out.weight for layer in
                   (each for block in rule_of(runs, **flags, **{"model.width": 64}).model.recurrence.core.blocks
                    for each in block.layers)]
        return torch.cat([weight.detach().flatten() for weight in weights]).std().item()

    core = 2 // flags.get("blocks.num", 1)
    assert std(4) / std(1) == pytest.approx(math.sqrt((2 + core) / (2 + 4 * core)), rel=0.05)


def test_the_formula_of_a_block_counts_the_activations_of_every_run():
    config = load_config(None, SMALL | BLOCKS | {"objective": "blockwise"})
    one, two, three = (formula_bytes(memory_config(config.replace(**{"model.core_runs": runs}), 2, False))
                       for runs in (1, 2, 3))
    assert three - two == two - one > 0


@torch.no_grad()
@pytest.mark.parametrize("context", ["inject", "concat", "context"])
def test_the_truth_of_earlier_rows_reaches_every_run_of_a_teacher_forced_solver(context):
    """At sigma_min the noised truth says as much as clean rows, and under `inject` each run has its own keys of it."""
    flags = {"objective": "denoise", "denoise.context": context}
    rule = moved(rule_of(**flags)).eval()
    rows, changed = text(), text()
    changed[:, 2] = (changed[:, 2] + 1) % VOCAB
    (_, losses, _), = rollout_of(rule).next_tokens(rows, [2], StepRandom(0, 0, count=3))
    (_, others, _), = rollout_of(rule).next_tokens(changed, [2], StepRandom(0, 0, count=3))
    assert losses.isfinite().all()
    assert torch.equal(losses[:, :1], others[:, :1])
    assert not torch.equal(losses[:, 3:], others[:, 3:])


def test_each_run_has_its_own_keys_and_shares_those_of_clean_rows():
    cache, clean, taught = Cache(), Cache(), Cache()
    shared, own = clean.layer(0), taught.child("run", 1).layer(0)
    runs = [Rows(cache=cache, context=clean).in_run(number) for number in range(2)]
    assert runs[0].layer(0).cache is not runs[1].layer(0).cache
    assert all(run.layer(0).context is shared for run in runs)
    assert Rows(context=taught).in_run(1).layer(0).context is own
    assert Rows().in_run(1).cache is None


def test_a_core_of_custom_blocks_runs_each_as_often():
    class Add(nn.Module):
        def forward(self, state, e, cond):
            return state + e

    class Double(nn.Module):
        def forward(self, state, e, cond):
            return 2 * state

    loop = RecurrentDepth(Core(Add(), Double(), runs=3), state_init="zero")
    assert loop(torch.ones(1, 1, 2), 3).flatten().tolist() == [3 * 8 + 3] * 2


@pytest.mark.parametrize(("flags", "why"), [
    ({"model.core_runs": 0}, r"model\.core_runs"),
    ({"model.core_runs": 2, "objective": "forward-forward", "images.source": "digits", "model.num_prelude_layers": 0,
      "model.num_coda_layers": 0, "model.injection": "none"}, r"model\.core_runs 2 does not fit .* set it to 1")])
def test_runs_that_cannot_be_are_refused(flags, why):
    with pytest.raises(UserError, match=why):
        load_config(None, flags)
    with pytest.raises(UserError, match="runs 0 is below 1"):
        Core(nn.Identity(), runs=0)
