"""The closed forms are what really runs: parameters, FLOPs as torch counts them, bytes as autograd keeps them."""


import pytest
import torch
from counting import LENGTH, ROWS, VOCAB, check_flops, config_of, forward, kept_bytes, measured_flops, objective_of

from looped.objectives.counts import count, format_counts
from looped.objectives.flops import parts_of, rows_of

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

TASK = {"task.name": "prefix-sums", "task.difficulty": [20, 20]}
LOOPS = {  # one case of each rule; a solver that must take all its steps, and has no matrix products of its own
    "full": {"recurrence.loss_on": "every"}, "one-step": {"supervision.segments": 3, "supervision.steps": 2},
    "fixed-point": {"fixed_point.max_steps": 4, "fixed_point.tol": 0.0, "fixed_point.solver": "fixed_point_iter"}}
FIXED_POINTS = [LOOPS["fixed-point"] | recipe for recipe in (
    {}, {"fixed_point.phantom_steps": 3, "fixed_point.tau": 0.7}, {"fixed_point.gradient": "implicit"},
    {"fixed_point.gradient": "implicit", "model.injection": "diagonal"})]
ARMS = ["full", "truncated", "ar", "denoise:inject", "denoise:concat", "denoise:context"]
RECIPES = [{"denoise.train_steps": 3}, {"denoise.train_steps": 2, "denoise.posterior": False},
           {"denoise.carry": "estimate"}, {"denoise.carry": "latent"},
           {"denoise.train_steps": 3, "denoise.carry": "estimate"},
           {"denoise.train_steps": 3, "denoise.carry": "latent"},
           {"denoise.evidence_in": True},
           {"denoise.block_size": 4}, {"denoise.block_size": 4, "denoise.order": "left-to-right"},
           {"denoise.block_size": 4, "denoise.train_steps": 2},
           {"denoise.block_size": 4, "denoise.train_steps": 2, "denoise.carry": "latent", "denoise.evidence_in": True}]
CASES = [(arm, recipe) for arm in ARMS if arm.startswith("denoise") for recipe in RECIPES
         if arm != "denoise:inject" or not {"denoise.block_size", "denoise.carry"} & recipe.keys()]
# ---- parameters


@pytest.mark.parametrize("arm", [*ARMS, "progressive", "one-step", "fixed-point"])
@pytest.mark.parametrize("settings", [{}, {"model.tie_embeddings": False, "model.injection": "gated"},
                                      {"denoise.target.tied": True, "denoise.target.dim": 64}],
                         ids=["plain", "untied head", "tied targets"])
def test_parameters_are_those_of_the_objective(arm, settings):
    config = config_of(arm, **settings)
    objective, counts = objective_of(config), count(config, VOCAB)
    assert counts.parameters == sum(p.numel() for p in objective.parameters())
    assert counts.core_parameters == sum(p.numel() for p in objective.model.recurrence.core.parameters())


def test_effective_parameters_count_the_core_once_a_loop_step_and_once_for_a_denoiser():
    full, denoise = count(config_of("full"), VOCAB), count(config_of("denoise"), VOCAB)
    assert full.effective_parameters == full.parameters + 3 * full.core_parameters
    assert denoise.effective_parameters == denoise.parameters


# ---- FLOPs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arm", ARMS)
def test_flops_are_those_that_torch_counts(arm, precision):
    check_flops(config_of(arm, **{"training.precision": precision}))


@pytest.mark.parametrize(("arm", "recipe"), CASES, ids=str)
def test_flops_of_every_recipe_are_those_that_torch_counts(arm, recipe):
    """Of blocks the pairs that the mask allows, though the kernel works out all queries x keys."""
    check_flops(config_of(arm, **recipe))


@pytest.mark.parametrize(("arm", "recipe"), [*LOOPS.items(), *(("fixed-point", each) for each in FIXED_POINTS[1:])],
                         ids=str)
def test_flops_of_every_loop_are_those_that_torch_counts(arm, recipe):
    check_flops(config_of(arm, **recipe))


@pytest.mark.parametrize("loss_on", ["last", "every"])
@pytest.mark.parametrize("weight", [0.0, pytest.param(0.3, marks=pytest.mark.slow), 1.0])
def test_flops_of_progressive_are_the_mean_over_all_its_draws(weight, loss_on, monkeypatch):
    config = config_of("progressive", **{"recurrence.progressive_weight": weight, "recurrence.loss_on": loss_on})
    most, mean = config.recurrence.mean, torch.zeros(3, dtype=torch.float64)
    for n in range(most):
        for k in range(1, most - n + 1):
            monkeypatch.setattr("looped.objectives.bptt.sample_progressive_depths", lambda *_, n=n, k=k: (n, k))
            mean += torch.tensor([*measured_flops(config), kept_bytes(config)]) / (most * (most - n))
    counts = count(config, VOCAB)
    ours = [counts.forward_flops, counts.step_flops, counts.saved_activation_bytes]
    assert ours == pytest.approx(mean.tolist(), rel=1e-4)


@pytest.mark.parametrize("settled", ["random", "surest"])
def test_the_costs_of_settled_cells_are_those_of_their_levels_and_of_who_says_so(settled):
    config = config_of("denoise:inject", **TASK, **{"denoise.order": "confidence", "denoise.settled": settled})
    counts, (forwards, whole) = count(config, VOCAB), measured_flops(config)
    assert (counts.forward_flops, counts.step_flops) == pytest.approx((forwards, whole), rel=1e-9)


@pytest.mark.parametrize("arm", ["full", "denoise:inject"])
def test_the_costs_of_an_image_are_those_of_its_patches_and_the_row_of_its_class(arm):
    pytest.importorskip("sklearn")
    config = config_of(arm, **LOOPS.get(arm, {}), **{"images.source": "digits", "model.patch_size": 2})
    counts, (forwards, whole) = count(config, VOCAB), measured_flops(config)
    assert rows_of(config) == 17 != config.data.length
    assert counts.parameters == sum(p.numel() for p in objective_of(config).parameters())
    assert (counts.forward_flops, counts.step_flops) == pytest.approx((forwards, whole), rel=1e-9)
    assert counts.saved_activation_bytes == pytest.approx(kept_bytes(config), rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("rule", "recipe"), [
    ("noprop-dt", {"blocks.num": 2}), ("noprop-dt", {"blocks.num": 2, "noprop.embedding": "one-hot"}),
    ("noprop-ct", {}), ("noprop-ct", {"noprop.embedding": "one-hot", "noprop.schedule": "cosine"}),
    ("noprop-fm", {}), ("noprop-fm", {"noprop.embedding": "one-hot"})], ids=str)
def test_the_costs_of_noprop_are_those_of_one_reading(rule, recipe, precision):
    """Of the bytes, what stands in the row of the class alone is not counted to the last."""
    pytest.importorskip("sklearn")
    config = config_of(rule, **recipe, **{"images.source": "digits", "model.patch_size": 2,
                                          "training.precision": precision})
    objective, counts = objective_of(config), count(config, VOCAB)
    assert counts.parameters == counts.effective_parameters == sum(p.numel() for p in objective.parameters())
    assert counts.saved_activation_bytes == pytest.approx(kept_bytes(config), rel=0.03)
    if precision == "fp32":
        check_flops(config)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", [{}, {"forward_forward.negatives": "hard", "forward_forward.goodness": "sum"}],
                         ids=["uniform", "hard"])
def test_the_costs_of_forward_forward_are_those_of_two_passes_and_of_all_classes_tried(recipe, precision):
    pytest.importorskip("sklearn")
    config = config_of("forward-forward", **recipe, **{
        "model.num_prelude_layers": 0, "model.num_coda_layers": 0, "model.injection": "none", "images.source": "digits",
        "model.patch_size": 2, "training.precision": precision})
    objective, counts = objective_of(config), count(config, VOCAB)
    assert counts.parameters == counts.effective_parameters == sum(p.numel() for p in objective.parameters())
    assert counts.saved_activation_bytes == pytest.approx(kept_bytes(config), rel=5e-3)
    if precision == "fp32":
        check_flops(config)


@pytest.mark.parametrize("arm", ["full", "one-step", "fixed-point", "denoise:inject"])
def test_the_costs_of_a_task_are_those_of_its_cells_which_all_see_each_other(arm):
    """Left out of the bytes: what is kept once a sequence."""
    config = config_of(arm, **LOOPS.get(arm, {}), **TASK)
    counts, (forwards, whole) = count(config, VOCAB), measured_flops(config)
    assert rows_of(config) == 21 != config.data.length
    assert (counts.forward_flops, counts.step_flops) == pytest.approx((forwards, whole), rel=1e-9)
    assert counts.saved_activation_bytes == pytest.approx(kept_bytes(config), rel=1e-3)


def test_flops_follow_the_expected_depth():
    """Positive control: 32 more steps without gradient cost 32 cores, a step with gradient three."""
    def flops(mean, backprop):
        config = config_of("truncated", **{"recurrence.mean": mean, "recurrence.backprop": backprop})
        parts = {part.name: part.flops * LENGTH * ROWS for part in parts_of(config, VOCAB)}
        return count(config, VOCAB).step_flops, parts["core"] + parts["injection"]

    (shallow, once), (deep, _), (taught, _) = flops(4, 2), flops(36, 2), flops(4, 3)
    assert deep - shallow == pytest.approx(32 * once, abs=1)
    assert taught - shallow == pytest.approx(2 * once, abs=1)


# ---- bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("block", ["sandwich", "prenorm"])
@pytest.mark.parametrize("arm", ARMS)
def test_saved_bytes_are_those_that_autograd_keeps(arm, block, precision):
    config = config_of(arm, **{"model.block": block, "training.precision": precision})
    assert count(config, VOCAB).saved_activation_bytes == pytest.approx(kept_bytes(config), rel=5e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("arm", "recipe"), CASES, ids=str)
def test_saved_bytes_of_every_recipe_are_those_that_autograd_keeps(arm, recipe, precision):
    """Left out: numbers that are kept once however long the text is, four bytes each."""
    config = config_of(arm, **recipe, **{"training.precision": precision})
    assert count(config, VOCAB).saved_activation_bytes == pytest.approx(kept_bytes(config), abs=64)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("block", ["sandwich", "prenorm"])
@pytest.mark.parametrize(("arm", "recipe"), [*LOOPS.items(), *(("fixed-point", each) for each in FIXED_POINTS[1:])],
                         ids=str)
def test_saved_bytes_of_every_loop_are_those_that_autograd_keeps(arm, recipe, block, precision):
    config = config_of(arm, **recipe, **{"model.block": block, "training.precision": precision})
    assert count(config, VOCAB).saved_activation_bytes == pytest.approx(kept_bytes(config), rel=2e-3)


@pytest.mark.parametrize("settings", [
    {"model.injection": "gated"}, {"model.injection": "diagonal"}, {"model.injection": "add"},
    {"model.injection": "none", "denoise.block_size": 1}, {"model.qk_norm": True}, {"model.num_kv_heads": 2},
    {"model.block": "sandwich"}, {"denoise.target.tied": True, "denoise.target.dim": None},
    {"denoise.target.learned_logit_scale": False}], ids=str)
@pytest.mark.parametrize("arm", ["denoise:concat", "denoise:context"])
def test_saved_bytes_of_all_recipes_together_hold_for_every_kind_of_layer(arm, settings):
    config = config_of(arm, **RECIPES[-1] | settings)
    assert count(config, VOCAB).saved_activation_bytes == pytest.approx(kept_bytes(config), rel=0.02)


@pytest.mark.parametrize("arm", ["full", "denoise:concat"])
@pytest.mark.parametrize("settings", [
    {"model.injection": "gated"}, {"model.injection": "diagonal"}, {"model.injection": "add"},
    {"model.injection": "none"}, {"model.qk_norm": True}, {"model.num_kv_heads": 2}, {"model.tie_embeddings": False},
    {"model.num_prelude_layers": 0, "model.num_coda_layers": 0}, {"denoise.posterior": False},
    {"denoise.target.tied": True, "denoise.target.dim": 64}], ids=str)
def test_saved_bytes_hold_for_every_kind_of_layer(arm, settings):
    config = config_of(arm, **settings)
    assert count(config, VOCAB).saved_activation_bytes == pytest.approx(kept_bytes(config), rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("arm", "recipe"), [("full", {}), ("denoise:context", {}), ("fixed-point", FIXED_POINTS[2])])
def test_a_feed_forward_net_of_two_matrices_is_counted_as_it_runs(arm, recipe, precision):
    config = config_of(arm, **recipe, **{"model.ffn": "gelu", "training.precision": precision})
    counts = count(config, VOCAB)
    assert counts.parameters == sum(p.numel() for p in objective_of(config).parameters())
    assert counts.parameters < count(config.replace(**{"model.ffn": "swiglu"}), VOCAB).parameters
    check_flops(config)
    assert counts.saved_activation_bytes == pytest.approx(kept_bytes(config), rel=5e-4)


@pytest.mark.parametrize(("arm", "recipe"), [
    ("full", {}), ("ar", {}), ("full", {"model.block": "sandwich"}), ("denoise:inject", {}), ("denoise:context", {}),
    ("denoise:context", {"denoise.block_size": 4})], ids=str)
def test_saved_bytes_of_checkpointed_layers_are_their_inputs(arm, recipe):
    config = config_of(arm, **recipe | {"training.checkpoint_activations": True})
    assert count(config, VOCAB).saved_activation_bytes == pytest.approx(kept_bytes(config), rel=0.01)
    assert kept_bytes(config) < 0.7 * kept_bytes(config_of(arm, **recipe))


def test_saved_bytes_are_one_micro_batchs():
    whole, half = config_of("full", **{"training.batch_size": 6}), config_of(
        "full", **{"training.batch_size": 6, "training.accumulation": 2})
    assert count(half, VOCAB).saved_activation_bytes == count(config_of("full"), VOCAB).saved_activation_bytes
    assert count(half, VOCAB).step_flops == count(whole, VOCAB).step_flops


def test_depth_costs_bptt_the_same_bytes_a_step_and_a_denoiser_none():
    """Measured, not counted. The loop is the positive control."""
    def kept(arm):
        return [kept_bytes(config_of(arm, **{"recurrence.mean": mean, "recurrence.backprop": mean}))
                for mean in (1, 2, 3, 9)]

    one, two, three, nine = kept("full")
    assert two - one == three - two == (nine - three) / 6 > 0
    assert len(set(kept("denoise"))) == 1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_bytes_are_weights_gradients_and_the_optimisers_own(name):
    from looped.training.optim import build_optimizers

    config = config_of("denoise", **{"optim.name": name, "optim.ema_decay": 0.99})
    objective, counts = objective_of(config), count(config, VOCAB)
    forward(config, objective).backward()
    optimizers = build_optimizers(objective, config.optim)
    for optimizer in optimizers:
        optimizer.step()
    state = sum(t.nbytes for opt in optimizers for s in opt.state.values() for t in s.values() if t.ndim)
    weights = sum(p.nbytes for p in objective.parameters())
    expected = 3 * weights + state + counts.saved_activation_bytes  # with gradients and averaged weights
    assert counts.training_bytes == pytest.approx(expected, rel=1e-3)


def test_the_table_names_every_figure():
    text = format_counts(count(config_of("denoise"), VOCAB))
    assert len(text.splitlines()) == 6
    assert "MB" in text


# ---- a denoiser of pixels


PIXELS = {"images.source": "digits", "images.goal": "generate", "model.patch_size": 2, "model.num_prelude_layers": 0,
          "model.num_coda_layers": 0, "model.num_core_layers": 4, "model.injection": "none", "denoise.weight": "edm"}


@pytest.mark.parametrize("recipe", [
    {}, {"objective": "blockwise", "blocks.num": 2}, {"training.precision": "bf16", "model.qk_norm": True},
    {"model.block": "sandwich", "model.num_kv_heads": 2}, {"model.block": "sandwich", "training.precision": "bf16"},
    {"model.patch_size": 4, "denoise.weight": "none"}, {"training.checkpoint_activations": True},
    {"training.checkpoint_activations": True, "training.precision": "bf16"}], ids=str)
def test_a_denoiser_of_pixels_is_counted_as_it_runs(recipe):
    pytest.importorskip("sklearn")
    config = config_of(**PIXELS | {"objective": "denoise"} | recipe)
    objective, counts = objective_of(config), count(config, VOCAB)
    assert counts.parameters == counts.effective_parameters == sum(p.numel() for p in objective.parameters())
    if not config.training.checkpoint_activations:  # these run again in backward
        check_flops(config)
    assert counts.saved_activation_bytes == pytest.approx(kept_bytes(config), rel=2e-3)
