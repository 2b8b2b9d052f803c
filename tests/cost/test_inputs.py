"""A benchmark times what training sees: shape, vocabulary, who sees whom and where, for each kind of data."""

from functools import partial

import pytest
import torch

from looped.cli import main
from looped.config import dump_config, load_config
from looped.cost.arm_timing import Stepper
from looped.cost.counts import count
from looped.cost.mfu import bench_flops, format_flops, matrix_products
from looped.data.batch import Batch
from looped.data.from_config import open_data
from looped.domains import domain_of
from looped.errors import UserError
from looped.nn.rows import PLAIN
from looped.objectives.base import rows_of_batch

SMALL = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "training.batch_size": 4,
         "denoise.cond_width": 4, "data.length": 24, "data.vocab_size": 260, "evaluation.prompt_length": 4}
TASKS = [{"task.name": "sudoku", "denoise.context": "inject"},
         {"task.name": "prefix-sums", "denoise.context": "inject", "task.difficulty": [3, 9]},
         {"task.name": "prefix-sums", "denoise.context": "inject", "task.window": 2},
         {"task.name": "prefix-sums", "task.layout": "causal"},
         {"task.name": "addition", "task.layout": "causal", "objective": "truncated"}]
IMAGES = {"images.source": "digits", "model.patch_size": 4, "denoise.context": "inject"}
MADE = IMAGES | {"images.goal": "generate", "model.num_prelude_layers": 0, "model.num_coda_layers": 0,
                 "model.injection": "none", "denoise.weight": "edm"}


def batches(config):
    """(micro-batches of the benchmark, those of the first step of training)."""
    c, data = config.training, open_data(config)
    length = {} if config.kind.name != "text" else {"length": config.data.length}
    size = c.batch_size // c.accumulation
    return domain_of(config).first_inputs(config), [
        data.train.batch(0, batch_size=c.batch_size, seed=config.seed, rows=range(first, first + size), **length)
        for first in range(0, c.batch_size, size)], data


def same(first, second):
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.mark.parametrize("settings", [*TASKS, IMAGES, MADE], ids=str)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_problems_and_images_are_the_first_batch_of_training(settings, accumulation):
    if "images.source" in settings:
        pytest.importorskip("sklearn")
    config = load_config(None, SMALL | settings | {"training.accumulation": accumulation})
    timed, trained, data = batches(config)
    assert len(timed.micro_batches) == len(trained) == accumulation
    for ours, theirs in zip(timed.micro_batches, trained, strict=True):
        assert type(ours) is type(theirs)
        assert all(same(value, getattr(theirs, name)) for name, value in vars(ours).items())
    assert (timed.vocab_size, timed.picture) == (data.vocab_size, data.picture)


@pytest.mark.parametrize("objective", ["truncated", "denoise", "masked", "ar"])
def test_random_tokens_have_the_shape_and_the_vocabulary_of_a_text(objective, tmp_path):
    for part in range(4):
        (tmp_path / f"{part}.txt").write_text(f"{part} " + "def f(x):\n    return x + 1\n" * 60)
    config = load_config(None, SMALL | {"objective": objective, "data.path": str(tmp_path), "data.heldout": 0.25,
                                        "data.cache_dir": str(tmp_path / "tokens"), "training.accumulation": 2})
    data = open_data(config)
    (tmp_path / "tokenizer.json").write_text(data.tokenizer.json())
    config = config.replace(**{"data.tokenizer": str(tmp_path / "tokenizer.json")})
    timed, trained, data = batches(config)
    assert timed.vocab_size == data.vocab_size != 1024  # of the tokenizer that is loaded, not of data.vocab_size
    for ours, theirs in zip(timed.micro_batches, trained, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) == ((2, 25), torch.int64)
        assert rows_of_batch(Batch.of(ours)) is rows_of_batch(Batch.of(theirs)) is PLAIN
        assert ours.max() < data.vocab_size
    assert not torch.equal(*timed.micro_batches)


def test_problems_are_counted_as_long_as_their_batch_is_padded():
    """Positive control: problems of the middle of the range alone would be a fifth too cheap."""
    config = load_config(None, SMALL | TASKS[1])
    stepper, middle = Stepper(config), config.replace(**{"task.difficulty": [6, 6]})
    ours, theirs = (count(each, stepper.inputs.vocab_size).step_flops for each in (config, middle))
    assert stepper.step_flops() == pytest.approx(ours, rel=0.05)
    assert ours > 1.2 * theirs


def test_flops_a_second_are_those_of_the_data(monkeypatch):
    """Of a task under its mask, in which all cells see each other."""
    monkeypatch.setattr("looped.cost.mfu.matrix_products", partial(matrix_products, squares=[256]))  # of 2,048: slow
    config = load_config(None, SMALL | TASKS[1])
    result = bench_flops(config, dtypes=["fp32"], repeats=1)
    assert result["tokens"] == 4 * domain_of(config).first_inputs(config).num_rows
    assert 0 < result["fp32"]["utilisation"] < 1
    assert "fp32" in format_flops(result)


def test_flops_a_second_of_what_truncated_steps_are_not_for_are_refused(tmp_path, capsys):
    pytest.importorskip("sklearn")
    config = load_config(None, SMALL | MADE | {"objective": "denoise"})
    with pytest.raises(UserError, match=r"truncated steps, which are for text, puzzles, classify, and this config"):
        bench_flops(config)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert main(["bench", "flops", str(tmp_path / "c.yaml")]) == 2
    assert "times truncated steps" in capsys.readouterr().err


@pytest.mark.parametrize(("accumulation", "longest"), [(1, 9), (2, 8), (4, 6)])
def test_typical_problems_are_spread_over_the_range(accumulation, longest):
    config = load_config(None, SMALL | TASKS[1] | {"task.difficulty": [2, 9], "training.accumulation": accumulation})
    inputs = domain_of(config).typical_inputs(config)
    assert inputs.num_rows == 1 + longest
    assert [len(part) for part in inputs.micro_batches] == [4 // accumulation]


def test_the_shipped_sudoku_is_timed_as_sudoku():
    config = load_config("configs/sudoku4-denoise.yaml")
    (part,) = domain_of(config).first_inputs(config).micro_batches
    assert (part.inputs.shape, part.causal, domain_of(config).first_inputs(config).vocab_size) == ((64, 16), False, 5)


@pytest.mark.parametrize("objective", ["ar", "denoise", "masked"])
def test_documents_kept_apart_are_timed_under_their_mask(objective):
    config = load_config(None, {"objective": objective, "data.documents": "separate", "model.width": 16,
                                "model.num_heads": 2, "data.vocab_size": 257, "data.length": 64})
    stepper = Stepper(config)
    batch = stepper.objective.ask(stepper.inputs.micro_batches[0])
    assert batch.documents.max() > 0
    assert stepper.loss().isfinite()


def test_with_one_difficulty_for_a_batch_costs_are_their_mean_and_memory_that_of_the_hardest():
    settings = SMALL | {"task.name": "prefix-sums", "denoise.context": "inject", "objective": "full"}

    def counts(low, high, **more):
        return count(load_config(None, settings | {"task.difficulty": [low, high]} | more), 4)

    found = counts(4, 32, **{"task.per_problem": False})
    single = [counts(level, level) for level in (4, 11, 18, 25, 32)]
    assert found.step_flops == pytest.approx(sum(each.step_flops for each in single) / 5, rel=1e-6)
    assert found.forward_flops == pytest.approx(sum(each.forward_flops for each in single) / 5, rel=1e-6)
    assert found.tokens == pytest.approx(sum(each.tokens for each in single) / 5)
    assert found.saved_activation_bytes == single[-1].saved_activation_bytes
    padded = counts(4, 32)
    assert found.step_flops < 0.75 * padded.step_flops
    assert counts(5, 5, **{"task.per_problem": False}) == counts(5, 5)


def test_a_benchmark_times_the_hardest_of_them():
    settings = SMALL | {"task.name": "prefix-sums", "denoise.context": "inject"}
    for seed in range(3):
        config = load_config(None, settings | {"task.difficulty": [4, 32], "task.per_problem": False, "seed": seed})
        timed, hardest = (domain_of(each).first_inputs(each) for each in (
            config, load_config(None, settings | {"task.difficulty": [32, 32], "seed": seed})))
        assert torch.equal(timed.micro_batches[0].inputs, hardest.micro_batches[0].inputs)
