"""The closed forms of several blocks, and of masked text, are what really runs: the mean over the blocks of a step."""

import pytest
from counting import VOCAB, check_flops, check_mean_over_blocks, config_of, kept_bytes, measured_flops, objective_of

from looped.objectives.counts import count

UNTIED = {"model.num_core_layers": 4, "blocks.num": 2, "blocks.layers": [1, 3]}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arm", ["ar", "full", "truncated"])
def test_blocks_of_the_core_are_counted_as_they_run(arm, precision):
    config = config_of(arm, **UNTIED, **{"training.precision": precision})
    objective, counts = objective_of(config), count(config, VOCAB)
    assert counts.parameters == sum(p.numel() for p in objective.parameters())
    assert counts.effective_parameters == counts.parameters + counts.core_parameters * (arm != "ar")
    assert counts.saved_activation_bytes == pytest.approx(kept_bytes(config), rel=2e-3)
    if precision == "fp32":
        check_flops(config)


BLOCKWISE = {**UNTIED, "denoise.noise.share_at_max": 0.5, "blocks.edges": [2.0], "denoise.context": "concat"}


@pytest.mark.parametrize("recipe", [{}, {"denoise.context": "context"}, {"denoise.context": "inject"},
                                    {"blocks.choose": "mass"}, {"training.precision": "bf16"},
                                    {"denoise.block_size": 4}, {"denoise.carry": "estimate"}], ids=str)
def test_one_block_at_a_time_costs_the_mean_over_the_blocks(recipe, monkeypatch):
    config = config_of("blockwise", **BLOCKWISE | recipe)
    objective, counts = objective_of(config), count(config, VOCAB)
    assert counts.parameters == counts.effective_parameters == sum(p.numel() for p in objective.parameters())
    check_mean_over_blocks(config, "looped.objectives.blockwise.Blockwise.draw", monkeypatch)


def test_frozen_shared_parts_cost_no_backward_of_their_own(monkeypatch):
    config = config_of("blockwise", **BLOCKWISE | {"blocks.shared": "frozen", "denoise.context": "inject"})
    monkeypatch.setattr("looped.objectives.blockwise.Blockwise.draw", lambda self, random: 0)
    counts, (forwards, whole) = count(config, VOCAB), measured_flops(config)
    trained = count(config.replace(**{"blocks.shared": "trained"}), VOCAB)
    assert counts.forward_flops == trained.forward_flops
    assert counts.step_flops / counts.forward_flops == pytest.approx(whole / forwards, rel=0.1)
    assert counts.training_bytes < trained.training_bytes


MASKED = [{}, {"masked.cond_width": None, "model.injection": "none"}, {"model.injection": "gated"},
          {"model.block": "sandwich", "model.tie_embeddings": False},
          {"model.num_prelude_layers": 0, "model.num_coda_layers": 0}]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", MASKED, ids=str)
def test_the_costs_of_a_masked_text_are_those_that_torch_counts(recipe, precision):
    config = config_of("masked", **{"masked.cond_width": 16, "training.precision": precision} | recipe)
    counts = count(config, VOCAB)
    assert counts.parameters == counts.effective_parameters == sum(p.numel() for p in objective_of(config).parameters())
    assert counts.saved_activation_bytes == pytest.approx(kept_bytes(config), abs=64)
    check_flops(config)


def test_one_block_of_a_masked_text_at_a_time_costs_the_mean_over_the_blocks(monkeypatch):
    config = config_of("masked", **UNTIED, **{"masked.schedule": "cosine", "blocks.choose": "mass"})
    check_mean_over_blocks(config, "looped.objectives.one_block.OneBlock.draw", monkeypatch)
