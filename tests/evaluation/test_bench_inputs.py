"""A benchmark times what training sees: shape, vocabulary, who sees whom and where, for each kind of data."""

import pytest
import torch

from looped.cli import main
from looped.config import dump_config, load_config
from looped.data.batch import Batch
from looped.data.opening import open_data
from looped.errors import UserError
from looped.evaluation import cost
from looped.evaluation.bench_inputs import bench_inputs
from looped.nn.rows import PLAIN
from looped.objectives.base import rows_of_batch
from looped.objectives.counts import count
from looped.objectives.flops import rows_of

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
    length = {} if config.is_task or config.is_images else {"length": config.data.length}
    size = c.batch_size // c.accumulation
    return bench_inputs(config), [
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


@pytest.mark.parametrize("settings", [*TASKS, IMAGES, MADE, {}], ids=str)
def test_the_flops_beside_are_those_of_the_batch(settings):
    """Sequences of a task are filled up to the longest of the batch, those of the second task to other than the middle
    of its range."""
    if "images.source" in settings:
        pytest.importorskip("sklearn")
    config = load_config(None, SMALL | settings)
    stepper = cost.Stepper(config)
    (part,), (own,) = stepper.inputs.micro_batches, stepper.inputs.configs
    sought = part[:, 1:] if isinstance(part, torch.Tensor) else getattr(part, "targets", None)
    length = part.num_rows if sought is None else sought.shape[1]
    assert rows_of(own) == length
    assert stepper.step_flops() == count(own, stepper.inputs.vocab_size).step_flops
    assert (own == config) == (rows_of(config) == length)
    stepper.step()


def test_a_batch_of_the_hardest_problems_is_not_counted_as_the_middle_of_their_range():
    config = load_config(None, SMALL | TASKS[1])
    stepper = cost.Stepper(config)
    assert stepper.step_flops() > 1.2 * count(config, stepper.inputs.vocab_size).step_flops


def test_bench_flops_refuses_what_is_no_text(tmp_path, capsys):
    config = load_config(None, SMALL | TASKS[0])
    with pytest.raises(UserError, match=r"trains on problems of sudoku; use bench step$"):
        cost.bench_flops(config)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert main(["bench", "flops", str(tmp_path / "c.yaml")]) == 2
    assert "times a language model" in capsys.readouterr().err


def test_the_shipped_sudoku_is_timed_as_sudoku():
    config = load_config("configs/sudoku4-denoise.yaml")
    (part,) = bench_inputs(config).micro_batches
    assert (part.inputs.shape, part.causal, bench_inputs(config).vocab_size) == ((64, 16), False, 5)


@pytest.mark.parametrize("objective", ["ar", "denoise", "masked"])
def test_documents_kept_apart_are_timed_under_their_mask(objective):
    config = load_config(None, {"objective": objective, "data.documents": "separate", "model.width": 16,
                                "model.num_heads": 2, "data.vocab_size": 257, "data.length": 64})
    stepper = cost.Stepper(config)
    batch = stepper.objective.ask(stepper.inputs.micro_batches[0])
    assert batch.documents.max() > 0
    assert stepper.loss().isfinite()
