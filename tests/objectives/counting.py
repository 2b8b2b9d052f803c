"""What the closed forms of cost are held against: FLOPs as torch counts them, bytes as autograd keeps them."""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from looped.config import load_config
from looped.data.labelled import prepare_labelled
from looped.data.problems import prepare_task
from looped.models.build import build
from looped.nn import fused
from looped.objectives import build_objective
from looped.objectives.counts import count
from looped.objectives.denoise import carried_readings, settling_readings
from looped.objectives.flops import parts_of, picture_of, rows_of
from looped.rng import StepRandom

VOCAB, ROWS, LENGTH = 100, 3, 32
SMALL = {"model.width": 64, "model.num_heads": 4, "model.ffn_width": 96, "model.num_prelude_layers": 2,
         "model.num_coda_layers": 2, "data.length": LENGTH, "training.batch_size": ROWS, "denoise.cond_width": 16,
         "denoise.target.dim": 8, "recurrence.mean": 4, "recurrence.backprop": 2, "recurrence.distribution": "fixed"}
WITH_FIRST_READING, WITHOUT = 2, 0
"""Steps of seed 0 in which a denoiser that carries reads once without gradient, and in which it does not."""


def config_of(arm="full", **settings):
    objective, _, context = arm.partition(":")
    return load_config(None, SMALL | {"objective": objective, "denoise.context": context or "inject"} | settings)


def objective_of(config):
    return build_objective(config, build(config, VOCAB, picture_of(config))).train()


def inputs_of(config):
    if config.is_images:
        return prepare_labelled(config.images, config.model.patch_size).train.batch(0, batch_size=ROWS, seed=0)
    if config.is_task:
        return prepare_task(config.task).train.batch(0, batch_size=ROWS, seed=0)
    return torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def forward(config, objective, step=0):
    bf16 = config.training.precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        return objective(inputs_of(config), StepRandom(0, step, count=ROWS)).value


def kept_bytes(config):
    """What autograd keeps beside the parameters, every storage once."""
    objective = objective_of(config)
    known = {t.untyped_storage().data_ptr() for t in (*objective.parameters(), *objective.buffers())}
    kept = {}  # holds the tensors: a storage that was freed could lend its address to another

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(config, objective)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


class Everywhere:
    """Instead of a record of which module is at work, whose hooks stand in the way of a gradient inside backward."""

    parents = ("Global",)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


def flop_counter():
    counter = FlopCounterMode(display=False, custom_mapping=KERNELS)
    counter.mod_tracker = Everywhere()
    return counter


def attention_forward(q, k, v, dropout=0.0, is_causal=False, *, attn_mask=None, **kwargs):
    """Two products over the pairs that the mask allows; torch's own counter does not know this kernel."""
    batch, heads, length, dim = q.shape
    pairs = length * (length + 1) // 2 if is_causal else length * k.shape[-2]
    if attn_mask is not None:
        assert not is_causal
        pairs = int((attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1).expand(batch, 1, -1, -1)[0].sum())
    return 2 * 2 * batch * heads * dim * pairs


def attention_backward(grad, q, k, v, out, lse, dropout, is_causal, **kwargs):
    """Four products; the fifth makes the scores again."""
    return 2 * attention_forward(q, k, v, dropout, is_causal, **kwargs)


attention_forward._get_raw = attention_backward._get_raw = True  # the mask itself, not its shape
KERNELS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_forward,
           torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward}


def measured_flops(config):
    """(of the forward passes, with backward) of one training step: of a denoiser that reads first, the mean over a step
    with a first reading and one without. What backward makes a second time is left out."""
    objective, found = objective_of(config), []
    reads_first = carried_readings(config.denoise) + settling_readings(config.denoise)
    steps = (WITH_FIRST_READING, WITHOUT) if reads_first else (WITHOUT,)
    again = sum(part.flops * part.grad for part in parts_of(config, VOCAB) if part.name in ("head", "posterior"))
    for step in steps:
        with flop_counter() as forwards:
            value = forward(config, objective, step)
        # Longer rows work out a gate's gradient without their ungated output, the product that short ones make again.
        with flop_counter() as backwards, patch.object(fused, "_is_long", lambda grad: True):
            value.backward()
        backward = backwards.get_total_flops() - ROWS * rows_of(config) * again
        found.append((forwards.get_total_flops(), forwards.get_total_flops() + backward))
    return [sum(figures) / len(steps) for figures in zip(*found, strict=True)]


def check_flops(config):
    counts, (forwards, whole) = count(config, VOCAB), measured_flops(config)
    assert counts.forward_flops == pytest.approx(forwards, rel=1e-9)
    assert counts.step_flops == pytest.approx(whole, rel=1e-9)


def check_mean_over_blocks(config, draw, monkeypatch):
    """The counts are the mean over the blocks of what each costs; `draw`: the method that says which is at work."""
    objective, counts, mean = objective_of(config), count(config, VOCAB), torch.zeros(3, dtype=torch.float64)
    for block, share in enumerate(objective.shares):
        monkeypatch.setattr(draw, lambda self, random, block=block: block)
        mean += share * torch.tensor([*measured_flops(config), kept_bytes(config)], dtype=torch.float64)
    ours = [counts.forward_flops, counts.step_flops, counts.saved_activation_bytes]
    assert ours == pytest.approx(mean.tolist(), rel=1e-3)
