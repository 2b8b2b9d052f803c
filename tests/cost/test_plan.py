"""`looped plan`: its bytes are those of the parts it names, its batch is the largest that fits, its time the FLOPs'."""

import pytest

from looped.cli import main
from looped.config import load_config
from looped.cost.counts import count
from looped.cost.plan import bytes_of, plan
from looped.errors import UserError
from looped.models.build import build
from looped.objectives import build_objective
from looped.training.optim import hidden_matrices

SMALL = {"model.width": 32, "model.num_heads": 2, "data.length": 16, "data.vocab_size": 300, "objective": "full",
         "recurrence.mean": 2, "training.batch_size": 8, "optim.ema_decay": 0.9, "evaluation.prompt_length": 4}
VOCAB = 300


def small(**changes):
    return load_config(None, SMALL | changes)


def test_one_process_has_the_memory_that_info_counts():
    config = small()
    assert plan(config, VOCAB, devices=1).memory.total == pytest.approx(count(config, VOCAB).training_bytes)


def test_shards_divide_what_is_kept_between_steps_and_send_as_much_as_ddp():
    whole, sharded = (plan(small(**{"training.shard": shard}), VOCAB, devices=4) for shard in ("none", "fsdp"))
    for part in ("weights", "gradients", "optimiser", "averages"):
        assert getattr(sharded.memory, part) == getattr(whole.memory, part) / 4 > 0
    assert sharded.memory.activations == whole.memory.activations
    weights = whole.memory.weights
    assert (whole.sent, sharded.sent) == (2 * 3 / 4 * weights, 2 * 3 / 4 * weights)
    assert sharded.memory.during == 2 * weights


def test_on_shards_muon_sends_its_matrices_there_and_back_in_bf16():
    config = small(**{"training.shard": "fsdp", "optim.name": "muon"})
    module = build_objective(config, build(config, VOCAB))
    hidden = sum(p.numel() for name, p in module.named_parameters() if name in hidden_matrices(module))
    muon, adamw = (plan(config.replace(**{"optim.name": name}), VOCAB, devices=4).sent for name in ("muon", "adamw"))
    assert muon - adamw == pytest.approx(3 / 4 * 2 * 2 * hidden / 4)  # a fourth of it in each process


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    limit = 5e6
    most = plan(small(), VOCAB, devices=1, limit=limit).most_rows
    assert most > 8
    assert plan(small(**{"training.batch_size": most}), VOCAB, devices=1).memory.total <= limit
    assert plan(small(**{"training.batch_size": most + 1}), VOCAB, devices=1).memory.total > limit


@pytest.mark.parametrize(("unit", "budget", "steps"), [("steps", 30, 30), ("tokens", 8 * 16 * 30, 30),
                                                       ("tokens", 8 * 16 * 30 + 1, 31)])
def test_time_is_the_flops_of_all_steps_over_the_speed_of_all_devices(unit, budget, steps):
    found = plan(small(**{"training.budget_unit": unit, "training.budget": budget}), VOCAB, devices=2, flops=1e9)
    assert found.steps == steps
    assert found.seconds == found.step_flops / 2e9


def test_what_is_computed_again_and_muons_own_products_take_time_but_are_no_flops_of_the_step():
    plain, again, muon = (plan(small(**changes), VOCAB, devices=2, flops=1e9) for changes in (
        {}, {"training.checkpoint_activations": True}, {"optim.name": "muon"}))
    assert plain.step_flops == again.step_flops == muon.step_flops
    assert again.counts.again_flops > 0 < muon.counts.update_flops
    assert again.seconds - plain.seconds == pytest.approx(again.counts.again_flops / 2e9)
    assert muon.seconds - plain.seconds == pytest.approx(muon.counts.update_flops / 1e9)


def test_muons_own_products_are_five_iterations_of_three_products_per_matrix():
    """X X^T, its square and the product with X, of a matrix of m <= n: 2 m m n + 2 m m m + 2 m m n (Jordan et al.)."""
    config = small(**{"optim.name": "muon", "model.num_prelude_layers": 0, "model.num_coda_layers": 0})
    model = build(config, VOCAB)
    shapes = [sorted(p.shape) for name, p in model.named_parameters() if name in hidden_matrices(model)]
    assert count(config, VOCAB).update_flops == sum(5 * (4 * m * m * n + 2 * m**3) for m, n in shapes) > 0


def test_blocks_that_a_step_leaves_out_are_added_up_by_ddp_all_the_same():
    config = small(**{"objective": "blockwise", "blocks.num": 2, "model.num_core_layers": 2, "denoise.cond_width": 8})
    found = plan(config, VOCAB, devices=2)
    assert found.memory.during == found.sent == found.memory.weights > 1.1 * found.memory.gradients


def test_a_checkpoint_is_weights_averages_and_moments_and_a_disk_takes_its_bytes_in_time():
    found = plan(small(), VOCAB, devices=2, disk=1e6)
    memory = found.memory
    assert found.counts.checkpoint_bytes == memory.weights + memory.averages + memory.optimiser
    assert found.writing == found.counts.checkpoint_bytes / 1e6


def test_layer_forwards_are_those_that_training_counts():
    config = small(**{"training.budget_unit": "layer-forwards", "training.budget": 8 * 30})
    each = count(config, VOCAB).layer_forwards
    assert plan(config, VOCAB, devices=1).steps == -(-30 // each)


@pytest.mark.parametrize(("text", "number"), [("80GB", 80e9), ("512 mb", 512e6), ("1.5T", 1.5e12), ("1000", 1000)])
def test_sizes_are_read(text, number):
    assert bytes_of(text, "--memory") == number


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "3XB", "inf"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match=r"is not a size; write e\.g\. 80GB"):
        bytes_of(text, "--memory")


@pytest.mark.parametrize(("flags", "said"), [
    (["--devices", "0"], "--devices 0 is not a number of devices"),
    (["--utilisation", "1.5"], "between 0 and 1; give a fraction such as 0.4"), (["--flops", "-1"], "is not a speed"),
    (["--disk", "fast"], "--disk 'fast' is not a size"), (["--memory", "much"], "--memory 'much' is not a size"),
    (["--devices", "1000"], "does not split into 1000 processes")])
def test_bad_flags_are_one_sentence(capsys, flags, said):
    assert main(["plan", "stdlib-full", *flags]) == 2
    assert said in capsys.readouterr().err


def test_the_command_prints_every_figure(capsys):
    assert main(["plan", "smoke", "--objective", "full", "--devices", "2", "--memory", "1GB", "--flops", "1e12",
                 "--disk", "1GB", "--training.budget_unit", "steps", "--training.budget", "3600"]) == 0
    said = capsys.readouterr().out
    for name in ("weights", "gradients", "optimiser state", "activations", "largest micro-batch", "sent", "FLOPs",
                 "steps                   3,600", " s to write", " h in all"):
        assert name in said
