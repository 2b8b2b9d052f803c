"""The memory of one block alone: what is held is what its parts add up to, and a block's share of the whole."""

import json

import pytest

from looped.cli import main
from looped.config import dump_config, load_config
from looped.cost.block_memory import bench_memory, format_memory, formula_bytes, memory_config
from looped.cost.counts import count
from looped.errors import UserError
from looped.models.build import build
from looped.objectives import build_objective

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

SMALL = {"objective": "blockwise", "model.width": 32, "model.num_heads": 2, "model.num_core_layers": 6,
         "model.num_prelude_layers": 0, "model.num_coda_layers": 0, "model.injection": "add", "blocks.num": 2,
         "data.length": 16, "data.vocab_size": 300, "training.batch_size": 4,
         "denoise.cond_width": 4, "evaluation.prompt_length": 4}


@pytest.fixture(scope="module")
def config():
    return load_config(None, SMALL)


@pytest.fixture(scope="module")
def result(config):
    return bench_memory(config, [1, 3], repeats=1)


def arm_of(result, blocks, checkpointed=False):
    return next(arm for arm in result["arms"] if (arm["blocks"], arm["checkpointed"]) == (blocks, checkpointed))


def test_a_block_alone_leaves_the_shared_parts_unless_the_config_trains_them_with_one(config):
    shared = {num: memory_config(config, num, False).blocks.shared for num in (1, 3)}
    assert config.blocks.shared == "trained"
    assert shared == {1: "trained", 3: "frozen"}
    assert memory_config(config.replace(**{"blocks.shared": "with-block"}), 3, False).blocks.shared == "with-block"


def test_the_stack_and_what_is_shared_are_weighed_apart(config, result):
    for num in (1, 3):
        arm_config = memory_config(config, num, False)
        objective = build_objective(arm_config, build(arm_config, 300))
        weights = sum(p.nbytes for p in objective.model.recurrence.core.parameters())
        arm = arm_of(result, num)
        assert (arm["stack"]["parameters"], arm["stack"]["gradients"]) == (weights, weights)
        assert arm["stack"]["optimizer"] == pytest.approx(2 * weights, rel=0.01)
        others = sum(p.nbytes for p in objective.parameters()) - weights
        assert arm["shared"]["parameters"] == others
        assert arm["shared"]["gradients"] == (others if num == 1 else 0)  # frozen beside a block
        assert (arm["shared"]["optimizer"] == 0) == (num == 3)


def test_one_of_three_blocks_has_a_third_of_the_stack(result):
    modulated = 1 + 6 * 4 / (16 * 32)  # beside 4 D^2 + 12 D^2 weights, 6 D for each number of the level's embedding
    assert arm_of(result, 3)["of_twin"]["stack"] == pytest.approx(modulated / 3, rel=0.02)
    assert arm_of(result, 1)["of_twin"] == {"stack": 1.0, "peak_rss_bytes": 1.0}


def test_kept_bytes_are_the_counted_ones(config, result):
    for arm in result["arms"]:
        arm_config = memory_config(config, arm["blocks"], arm["checkpointed"])
        counted = count(arm_config, 300).saved_activation_bytes
        assert arm["saved_activation_bytes"] == counted
    assert arm_of(result, 1, True)["saved_activation_bytes"] < 0.5 * arm_of(result, 1)["saved_activation_bytes"]


def test_the_formula_is_the_stack_and_its_activations(config, result):
    """Of one arm at twice the layers, so that what is not of a layer cancels."""
    for checkpointed in (False, True):
        short, long = (memory_config(config.replace(**{"model.num_core_layers": n}), 1, checkpointed) for n in (2, 4))
        of_short, of_long = count(short, 300), count(long, 300)
        grown = 4 * 4 * (of_long.core_parameters - of_short.core_parameters)
        grown += of_long.saved_activation_bytes - of_short.saved_activation_bytes
        assert formula_bytes(long) - formula_bytes(short) == pytest.approx(grown, rel=1e-6)
    assert formula_bytes(memory_config(config, 3, False)) == pytest.approx(
        formula_bytes(memory_config(config, 1, False)) / 3)


def test_peaks_are_above_an_empty_process_and_the_table_has_a_line_an_arm(result):
    assert json.loads(json.dumps(result)) == result
    for arm in result["arms"]:
        assert 0 < arm["peak_rss_bytes"] < 100e6 < arm["empty_rss_bytes"]
    assert len(format_memory(result).splitlines()) == 2 + 4 + 1


@pytest.mark.slow
def test_a_solver_step_of_images_is_that_of_one_block(config):
    """Images of 8 x 8 pixels are read by two layers of six where three blocks share them."""
    pytest.importorskip("sklearn")
    images = {"images.source": "digits", "images.goal": "generate", "model.patch_size": 2, "model.injection": "none",
              "denoise.weight": "edm", "denoise.context": "inject", "blocks.shared": "with-block",
              "blocks.edges_from": "a run that nobody needs here"}
    result = bench_memory(config.replace(**images), [1, 3], repeats=1)
    whole, part = arm_of(result, 1), arm_of(result, 3)
    assert (whole["solver_step"]["layers"], part["solver_step"]["layers"]) == (6, 2)
    for arm in (whole, part):
        assert arm["solver_step"]["weight_bytes"] == arm["stack"]["parameters"] + arm["shared"]["parameters"]
        assert arm["solver_step"]["seconds"] > 0
    assert part["of_twin"]["stack"] == pytest.approx(1 / 3, rel=0.01)
    assert "a solver step of 1 of 3 blocks: 2 layers, " in format_memory(result)


def test_what_does_not_fit_is_one_sentence(config, tmp_path, capsys):
    with pytest.raises(UserError, match=r"1 of 4 blocks: model.num_core_layers 6 does not split .* set it to 4 or 8"):
        bench_memory(config, [1, 4])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    for words, why in ({("--blocks", "x"): "--blocks 'x' is not a list", ("--config", "c.yaml"): "needs one YAML file"}
                       ).items():
        assert main(["bench", "memory", str(tmp_path / "c.yaml"), *words]) == 2
        assert why in capsys.readouterr().err
