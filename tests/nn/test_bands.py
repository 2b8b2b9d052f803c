"""Attention in parts on the CPU equals the dense formula, computes fewer pairs, and is left where nothing is saved."""

import pytest
import torch
from attention_oracle import formula, same
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from looped.nn import bands
from looped.nn.attention import attention
from looped.nn.bands import parts_of
from looped.nn.masks import Causal, CleanNoisyBlocks, Full, Near, Packed, Padded, SlidingWindow

B, H, K = 2, 4, 8


def grid(height, width, lengths=None):
    """Local attention on a grid, to two rows and columns away."""
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).unsqueeze(0)
    return Near(places, 2, None if lengths is None else torch.tensor(lengths))


def rows(length, kv_heads=H, dtype=torch.float64):
    torch.manual_seed(length)
    return [torch.randn(B, length, heads, K, dtype=dtype, requires_grad=True) for heads in (H, kv_heads, kv_heads)]


BANDED = {
    "grid": (grid(16, 16), 256),
    "grid, sequences of two lengths": (grid(16, 16, [256, 100]), 256),
    "grid, its last rows without keys": (grid(20, 13, [150, 120]), 260),
    "window": (SlidingWindow(40), 301),
    "documents": (Packed(((60, 100, 90, 50), (130, 20, 70, 80))), 300),
    "documents both ways": (Packed(((50,) * 6, (60,) * 5), causal=False), 300),
}


@pytest.mark.parametrize("kv_heads", [H, 2, 1])
@pytest.mark.parametrize("name", BANDED)
def test_it_equals_the_formula_in_value_and_gradient(name, kv_heads, monkeypatch):
    mask, length = BANDED[name]
    called = counted(monkeypatch)
    q, k, v = rows(length, kv_heads)
    same(attention(q, k, v, mask), formula(q, k, v, mask.dense(B, length, length)), (q, k, v))
    assert len(called) == -(-length // bands.ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_as_exact_as_those_of_the_whole_in_low_precision(dtype, monkeypatch):
    """Over 900 rows the whole runs in the given precision, its parts in float32."""
    q, k, v = rows(900, dtype=dtype)
    grad = torch.randn(B, 900, H, K, dtype=dtype)

    def both_passes(run, given):
        out = run(*given)
        return [out.detach(), *torch.autograd.grad(out, given, grad.to(out.dtype))]

    wide = [each.detach().double().requires_grad_() for each in (q, k, v)]
    exact = both_passes(lambda *given: formula(*given, grid(30, 30).dense(B, 900, 900)), wide)
    parts = both_passes(lambda *given: attention(*given, grid(30, 30)), [q, k, v])
    monkeypatch.setattr(bands, "LARGEST", 0)
    whole = both_passes(lambda *given: attention(*given, grid(30, 30)), [q, k, v])
    for ours, theirs, truth in zip(parts, whole, exact, strict=True):
        assert ours.dtype == dtype
        assert (ours - truth).abs().max() <= 1.5 * (theirs - truth).abs().max() + 1e-6


@pytest.mark.parametrize("queries", [200, 256])
def test_the_last_rows_of_a_cache_attend_in_parts(queries, monkeypatch):
    mask, length = BANDED["grid"]
    called = counted(monkeypatch)
    q, k, v = rows(length)
    allowed = mask.dense(B, queries, length)
    same(attention(q[:, -queries:], k, v, mask), formula(q[:, -queries:], k, v, allowed), (q, k, v))
    assert len(called) == 4


def test_half_precision_over_many_rows_runs_in_float32_if_each_part_has_few_keys(monkeypatch):
    """Where bf16 attention over 900 keys is slow on a CPU, its parts are not."""
    called = counted(monkeypatch)
    low = [each.detach() for each in rows(900, dtype=torch.bfloat16)]
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*low, grid(30, 30))
    assert out.dtype == torch.bfloat16
    assert {each.dtype for each in called} == {torch.float32}
    called.clear()
    attention(*low, Full())
    assert {each.dtype for each in called} == {torch.bfloat16}


@pytest.mark.parametrize(("mask", "length"), [
    (Causal(), 300), (Full(), 300), (grid(8, 8), 64), (grid(11, 11), 121), (Packed(((280, 20), (20, 280))), 300),
    (Padded([300, 200]), 300), (CleanNoisyBlocks(150, 75), 300)])
def test_where_little_would_be_saved_it_is_one_call(mask, length, monkeypatch):
    called = counted(monkeypatch)
    attention(*(each.float() for each in rows(length)), mask)
    assert len(called) == 1


def test_every_allowed_pair_is_in_a_part_and_the_parts_are_less_than_half():
    for mask, length in BANDED.values():
        allowed = mask.dense(B, length, length)
        parts = parts_of(allowed)
        assert [part.first for part in parts] == list(range(0, length, bands.ROWS))
        assert parts[-1].last == length
        outside = allowed.clone()
        for first, last, low, high in parts:
            outside[:, :, first:last, low:high] = False
        assert not outside.any()
        assert sum((part.last - part.first) * (part.high - part.low) for part in parts) <= length**2 / 2


def test_torch_counts_less_than_half_of_the_operations():
    q, k, v = (each.detach() for each in rows(900))

    def operations(mask):
        with FlopCounterMode(display=False, custom_mapping={
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: of_shapes}) as counter:
            attention(q, k, v, mask)
        return counter.get_total_flops()

    assert operations(grid(30, 30)) < 0.25 * operations(Full())


def of_shapes(q, k, v, *rest, **named):
    """FLOPs of a call of SDPA: two products of all its pairs."""
    return 4 * q[0] * q[1] * q[2] * q[3] * k[2]


def counted(monkeypatch):
    """The queries of each call of SDPA."""
    called = []
    inner = functional.scaled_dot_product_attention

    def call(q, *rest, **named):
        called.append(q)
        return inner(q, *rest, **named)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", call)
    return called
