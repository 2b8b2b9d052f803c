"""Cost figures are measured as they say: arms in processes of their own, taking turns; bytes and FLOPs as counted."""

import json
import os
import signal
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from looped.config import load_config
from looped.config.arms import parse_arm
from looped.cost.arm_timing import Arm, Stepper
from looped.cost.bench_step import at_mean_depth, bench_step, format_step
from looped.cost.counts import count
from looped.cost.mfu import _forward_backward, _layer_memory, _threads, bench_flops, format_flops, matrix_products
from looped.errors import UserError
from looped.nn.depth_sampling import expected_depths

SMALL = {"model.width": 32, "model.num_heads": 2, "data.length": 16, "data.vocab_size": 300, "training.batch_size": 2,
         "recurrence.mean": 6, "recurrence.backprop": 2, "denoise.cond_width": 8, "evaluation.prompt_length": 4}


@pytest.fixture(scope="module")
def config():
    return load_config(None, SMALL)


@pytest.fixture(scope="module")
def steps(config, in_place):
    """Of arms that take turns in this process."""
    with in_place():
        return bench_step(config, ["full", "truncated", "denoise", "wide=denoise:concat"], repeats=3)


@pytest.fixture(scope="module")
def apart(config):
    """Of arms in processes of their own."""
    return bench_step(config, ["truncated", "wide=denoise:concat"], repeats=3)


def test_every_arm_is_measured_and_the_figures_are_json(apart):
    assert json.loads(json.dumps(apart)) == apart
    assert list(apart["arms"]) == ["truncated", "wide"]
    for arm in apart["arms"].values():
        assert 0 < arm["step_seconds_min"] <= arm["step_seconds"] <= arm["step_seconds_max"]
        assert arm["peak_rss_bytes"] > arm["base_rss_bytes"] > 0


def test_a_process_of_its_own_changes_no_figure_that_is_counted(steps, apart):
    for name, arm in apart["arms"].items():
        for figure in ("saved_activation_bytes", "step_flops", "layer_forwards"):
            assert arm[figure] == steps["arms"][name][figure]


@pytest.mark.parametrize("arm", ["full", "truncated", "denoise", "denoise:concat"])
def test_bytes_and_flops_of_an_arm_are_the_counted_ones(config, steps, arm):
    counts = count(at_mean_depth(parse_arm(config, arm).config), 300)
    name = "wide" if arm == "denoise:concat" else arm
    assert steps["arms"][name]["saved_activation_bytes"] == counts.saved_activation_bytes
    assert steps["arms"][name]["step_flops"] == counts.step_flops


def test_layer_forwards_are_the_arithmetic_of_the_method(steps):
    """Per sequence: 7 steps of 2 layers, the last 2 with gradient, prelude and coda; against one pass."""
    forwards = {name: arm["layer_forwards"] / 2 for name, arm in steps["arms"].items()}
    assert forwards == {"full": 3 * (12 + 2), "truncated": 5 * 2 + 3 * (4 + 2), "denoise": 12, "wide": 18}


def test_ratios_divide_each_arm_by_the_later_ones(steps):
    assert len(steps["ratios"]) == 6
    ratio, arms = steps["ratios"]["truncated/denoise"], steps["arms"]
    for key in ("step_seconds", "step_cpu_seconds", "saved_activation_bytes", "layer_forwards"):
        assert ratio[key] == arms["truncated"][key] / arms["denoise"][key]
    assert ratio["step_seconds_min"] <= ratio["step_seconds_max"]


def test_the_timed_depth_is_the_mean_of_the_sampled_one(config):
    sampled = config.replace(**{"objective": "truncated", "recurrence.mean": 32, "recurrence.backprop": 8})
    (fixed, drawn) = (expected_depths(c.mean, c.backprop, distribution=c.distribution)
                      for c in (at_mean_depth(sampled).recurrence, sampled.recurrence))
    assert fixed == pytest.approx(drawn, abs=0.02)
    assert at_mean_depth(config) == config  # a denoiser has no depth to fix


def test_an_unknown_arm_is_named_with_the_nearest_known_one(config):
    with pytest.raises(UserError, match="did you mean 'truncated'"):
        bench_step(config, ["trunkated"])
    with pytest.raises(UserError, match="listed twice"):
        bench_step(config, ["a=full", "a=denoise"])
    with pytest.raises(UserError, match="at least one"):
        bench_step(config, [])


def test_an_arm_that_fails_is_one_sentence_with_its_name_and_cause(config):
    with Arm("full", config, 1) as arm, pytest.raises(UserError) as error:
        arm.ask("dance")
    assert str(error.value) == "bench arm 'full' ended early: KeyError: 'dance' (exit code 1)"


def test_an_arm_that_is_killed_is_said_to_lack_memory(config):
    with Arm("full", config, 1) as arm:
        arm.ask("step")
        os.kill(arm.process.pid, signal.SIGKILL)
        with pytest.raises(UserError,
                           match="arm 'full' ended early: it was killed, most likely because memory ran out"):
            arm.ask("step")


def test_peak_memory_is_the_arms_own_not_its_parents():
    """Positive control: a parent that once held 400 MB more hands that on to its children's getrusage."""
    ballast = torch.ones(100_000_000)
    del ballast
    with Arm("denoise", load_config(None, SMALL), 1) as arm:
        arm.ask("step")
        figures = arm.ask("figures")
    assert figures["peak_rss_bytes"] < figures["base_rss_bytes"] + 200_000_000


@pytest.fixture(scope="module")
def flops(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("looped.cost.mfu.matrix_products", partial(matrix_products, squares=[256]))  # of 2,048: slow
        return bench_flops(config, repeats=1)


def test_flops_are_given_beside_the_best_product(flops):
    assert json.loads(json.dumps(flops)) == flops
    for dtype in ("fp32", "bf16"):
        figures = flops[dtype]
        assert figures["utilisation"] == figures["model_flops_per_second"] / figures["matmul_flops_per_second"]
        assert 0 < figures["utilisation"] < 1
    assert flops["saved_activation_bytes_per_layer"] > 0
    assert "saved_activation_ratio" not in flops  # not a layer of Huginn's size


def test_threads_are_put_back(config):
    before = torch.get_num_threads()
    with _threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_layer_of_huginns_size_keeps_at_most_seven_tenths_of_its_bytes():
    config = load_config("configs/huginn-70m.yaml")
    memory = _layer_memory(config)
    assert memory["tokens"] == 1024
    assert memory["saved_activation_bytes_per_layer"] <= 0.7 * 63.6e6


def test_tables_have_a_line_an_arm_and_a_line_a_dtype(steps, flops):
    assert sum(line.startswith(("full ", "truncated ", "denoise ", "wide ")) for line in
               format_step(steps).splitlines()) == 4
    assert {line[:4] for line in format_flops(flops).splitlines()} >= {"fp32", "bf16"}


def test_an_unknown_dtype_is_named(config):
    with pytest.raises(UserError, match="did you mean 'bf16'"):
        bench_flops(config, dtypes=["bf61"])


class Casts(TorchDispatchMode):
    """Counts the casts of an objective's matrices."""

    def __init__(self, objective):
        super().__init__()
        self.places = {weight.data_ptr() for weight in objective.parameters() if weight.ndim == 2}
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.num += args[0].data_ptr() in self.places
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("run", [Stepper.step, _forward_backward])
def test_a_timed_step_casts_its_weights_once_as_training_does(config, run):
    def casts(depth):
        stepper = Stepper(config.replace(**{"objective": "full", "recurrence.mean": depth,
                                            "training.precision": "bf16"}))
        with Casts(stepper.objective) as found:
            run(stepper)
        return found.num

    assert casts(6) == casts(2) > 0
