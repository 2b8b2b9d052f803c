"""Attention under every mask and backend against the dense formula; the split form exact without its square tensor."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from looped.errors import UserError
from looped.nn import attention as module
from looped.nn.attention import attention, backend_report, context_attention, resolve_backend
from looped.nn.backends import dispatched_operator, expand_heads, reason_not, xformers_ops
from looped.nn.bias import Causal, CleanNoisy, Full, Packed, Padded

B, L, H, K = 2, 6, 4, 8
MASKS = {
    "full": Full(),
    "causal": Causal(),
    "right padded": Padded.from_lengths(torch.tensor([4, 6]), L),
    "left padded": Padded.from_lengths(torch.tensor([4, 6]), L, side="left"),
    "packed": Packed(torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])),
    "clean|noisy": CleanNoisy(3),
    "clean|noisy, strict": CleanNoisy(3, strict=True),
}


def draw(*shape, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()


def qkv(kv_heads=H, dtype=torch.float64, queries=L, keys=L):
    return (draw(B, queries, H, K, dtype=dtype), draw(B, keys, kv_heads, K, dtype=dtype, seed=1),
            draw(B, keys, kv_heads, K, dtype=dtype, seed=2))


def formula(q, k, v, allowed):
    """softmax(q k / sqrt K) v by hand; rows that see nobody are zero."""
    k, v = expand_heads(k, q.shape[2]), expand_heads(v, q.shape[2])
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / K**0.5
    probs = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1).nan_to_num(0.0)
    return torch.einsum("bhlm,bmhd->blhd", probs, v)


def same(ours, theirs, inputs, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    grad = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kv_heads", [H, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_sdpa_equals_the_formula_in_value_and_gradient(name, kv_heads):
    mask, (q, k, v) = MASKS[name], qkv(kv_heads)
    same(attention(q, k, v, mask), formula(q, k, v, mask.dense(L, L)), (q, k, v))


@pytest.mark.parametrize("name", [name for name in MASKS if "noisy" not in name])
def test_flex_equals_the_formula_without_gradient(name):
    mask, (q, k, v) = MASKS[name], (t.detach() for t in qkv(dtype=torch.float32))
    torch.testing.assert_close(attention(q, k, v, mask, backend="flex"), formula(q, k, v, mask.dense(L, L)),
                               rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("name", ["full", "causal", "left padded"])
def test_fewer_queries_than_keys_attend_as_the_last_rows(name, queries):
    mask, (q, k, v) = MASKS[name], qkv()
    whole = attention(q, k, v, mask)
    torch.testing.assert_close(attention(q[:, -queries:], k, v, mask), whole[:, -queries:])


@pytest.mark.parametrize("name", ["left padded", "right padded"])
def test_rows_that_see_nobody_are_zero_with_finite_gradients(name):
    mask, (q, k, v) = Padded.from_lengths(torch.tensor([0, 3]), L, side=name.split()[0]), qkv()
    out = attention(q, k, v, mask)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def joint(q, k, v, k_own, v_own, strict):
    """The same as dense attention over [context; own] with the 2L-wide mask."""
    n, m = q.shape[1], k.shape[1]
    seen = torch.ones(n, m, dtype=torch.bool).tril(m - n - int(strict))
    allowed = torch.cat([seen, torch.eye(n, dtype=torch.bool)], 1)
    return formula(q, torch.cat([k, k_own], 1), torch.cat([v, v_own], 1), allowed)


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("strict", [False, True])
def test_context_attention_is_exact_in_value_and_gradient(strict, kv_heads, length):
    q, k, v = qkv(kv_heads, queries=length, keys=length)
    own = draw(B, length, kv_heads, K, seed=3), draw(B, length, kv_heads, K, seed=4)
    same(context_attention(q, k, v, *own, strict=strict), joint(q, k, v, *own, strict), (q, k, v, *own))


@pytest.mark.parametrize("strict", [False, True])
def test_context_attention_of_a_few_new_rows_equals_the_whole(strict):
    q, k, v = qkv()
    own = draw(B, L, H, K, seed=3), draw(B, L, H, K, seed=4)
    whole = context_attention(q, k, v, *own, strict=strict)
    part = context_attention(q[:, -2:], k, v, own[0][:, -2:], own[1][:, -2:], strict=strict)
    torch.testing.assert_close(part, whole[:, -2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_context_attention_in_low_precision_is_within_twice_the_formulas_error(dtype):
    q, k, v = qkv(queries=64, keys=64)
    own = draw(B, 64, H, K, seed=3), draw(B, 64, H, K, seed=4)
    exact = joint(q, k, v, *own, False)
    low = [t.detach().to(dtype).requires_grad_() for t in (q, k, v, *own)]
    plain, ours = joint(*low, False), context_attention(*low)
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6
    exact_grads = torch.autograd.grad(exact.sum(), (q, k, v, *own))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
    for grad, exact_grad in zip(torch.autograd.grad(ours.sum(), low), exact_grads, strict=True):
        assert (grad - exact_grad).abs().max() <= tolerance * exact_grad.abs().max()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("strict", [False, True])
def test_clean_noisy_makes_no_square_tensor_forward_or_backward(strict):
    length = 256
    q, k, v = (draw(1, 2 * length, 1, 4, dtype=torch.float32, seed=s) for s in range(3))
    with Largest() as ours:
        attention(q, k, v, CleanNoisy(length, strict=strict)).sum().backward()
    with Largest() as dense:
        formula(q.detach()[..., :4], k, v, torch.ones(2 * length, 2 * length, dtype=torch.bool))
    assert dense.elements >= (2 * length) ** 2  # positive control: the formula makes it
    assert ours.elements < length**2


def test_clean_noisy_needs_both_halves():
    with pytest.raises(UserError, match="needs 14 rows"):
        attention(*qkv(), CleanNoisy(7))


def test_a_mask_for_another_batch_is_refused():
    with pytest.raises(UserError, match="made for 3 rows"):
        attention(*qkv(), Padded.from_lengths(torch.tensor([1, 2, 3]), L))


@pytest.mark.parametrize(("backend", "why"), [("xformers", "runs on CUDA, not on cpu"), ("flex", "no backward pass"),
                                              ("sdp", "did you mean 'sdpa'")])
def test_a_forced_backend_that_cannot_run_says_why(backend, why):
    with pytest.raises(UserError, match=why):
        attention(*qkv(), Causal(), backend=backend)


def test_the_report_names_what_runs_here():
    report = backend_report("cpu")
    assert report["sdpa"] == ""
    assert "CUDA" in report["xformers"]
    assert "backward" in report["flex"]


@pytest.mark.parametrize(("mask", "dtype", "expected"), [
    (Causal(), torch.bfloat16, ""), (CleanNoisy(3), torch.float32, ""), (MASKS["packed"], torch.float16, ""),
    (MASKS["left padded"], torch.bfloat16, "no bias class for Padded"), (Causal(), torch.float64, "not float64")])
def test_xformers_is_chosen_on_cuda_for_what_it_has(mask, dtype, expected):
    if xformers_ops() is None:
        pytest.skip("xformers is not installed")
    reason = reason_not("xformers", mask, "cuda", dtype)
    assert (reason == "") if expected == "" else (expected in reason)


class OnCuda:
    """What `resolve_backend` asks of a query, as if it lay on a CUDA device."""

    device, dtype, requires_grad = torch.device("cuda"), torch.bfloat16, True


def test_a_fallback_on_cuda_is_announced_once():
    module._announce.cache_clear()
    with pytest.warns(UserWarning, match="falls back to flex: xformers has no bias class for Padded"):
        assert resolve_backend("auto", MASKS["left padded"], OnCuda()) == "flex"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend("auto", MASKS["left padded"], OnCuda()) == "flex"


@pytest.mark.parametrize("name", ["full", "causal", "packed"])
def test_every_xformers_operator_says_why_it_declines_cpu_tensors(name):
    if xformers_ops() is None:
        pytest.skip("xformers is not installed")
    q, k, v = (t.detach().half() for t in qkv())
    operator, reasons = dispatched_operator(q.flatten(0, 1)[None], k.flatten(0, 1)[None], v.flatten(0, 1)[None],
                                            MASKS[name])
    assert operator == ""
    assert len(reasons) == len(xformers_ops().ALL_FW_OPS)
    assert any("device=cpu" in reason for reason in reasons)
