"""Attention under every mask and backend against the dense formula; what is chosen, what is refused, and why."""

import functools
import importlib.util
import warnings

import pytest
import torch
from attention_oracle import IN_XFORMERS, MASKS, ONE_PIECE, B, H, L, Operations, formula, qkv, same, xformers_stand_in
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend

from looped.errors import UserError
from looped.nn import attention as module
from looped.nn.attention import attention, available_backends, resolve_backend
from looped.nn.backends import RUN, reason_not, run_xformers, sdpa_declines, xformers_operators, xformers_ops
from looped.nn.masks import Causal, CleanNoisy, Full, Mask, Packed, Padded
from looped.nn.wide_attention import SHORT

needs_xformers = pytest.mark.skipif(xformers_ops() is None, reason="xformers is not installed")
unfused = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


class Window(Mask):
    """A user's own mask: each row sees itself and the row before."""

    def allow(self, q, k, b=0):
        return (k <= q) & (k >= q - 1)


class Blind(Causal):
    """A subclass that allows something else than the class it derives from."""

    def allow(self, q, k, b=0):
        return (k <= q) & (k != 0)


# ----------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("kv_heads", [H, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_sdpa_equals_the_formula_in_value_and_gradient(name, kv_heads):
    mask, (q, k, v) = MASKS[name], qkv(kv_heads)
    same(attention(q, k, v, mask), formula(q, k, v, mask.dense(B, L, L)), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MASKS)
def test_low_precision_is_within_twice_the_formulas_error(name, dtype):
    mask, low = MASKS[name], [t.detach() for t in qkv(dtype=dtype)]
    allowed, wide = mask.dense(B, L, L), [t.double() for t in low]
    exact = formula(*wide, allowed)
    error, plain = (attention(*low, mask) - exact).abs().max(), (formula(*low, allowed) - exact).abs().max()
    assert error <= 2 * plain + 1e-6


@unfused
@pytest.mark.parametrize("queries", [L, 2])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("name", ONE_PIECE)
def test_flex_equals_the_formula_without_gradient(name, kv_heads, queries, unchecked):
    mask, (q, k, v) = MASKS[name], (t.detach() for t in qkv(kv_heads, torch.float32, queries))
    torch.testing.assert_close(attention(q, k, v, mask, backend="flex"),
                               formula(q, k, v, mask.dense(B, queries, L)), rtol=1e-5, atol=1e-5)


@needs_xformers
@pytest.mark.parametrize("queries", [L, 2, 1])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("name", IN_XFORMERS)
def test_what_xformers_is_asked_equals_the_formula_in_value_and_gradient(name, kv_heads, queries, monkeypatch):
    monkeypatch.setattr(xformers_ops(), "memory_efficient_attention", xformers_stand_in)
    mask, (q, k, v) = MASKS[name], qkv(kv_heads, queries=queries)
    theirs = formula(q, k, v, mask.dense(B, queries, L))
    same(run_xformers(q, k, v, mask), theirs, (q, k, v))
    with torch.no_grad():  # grouped heads go as views then, which the stand-in checks
        torch.testing.assert_close(run_xformers(q, k, v, mask), theirs)


@needs_xformers
def test_a_batch_of_padding_alone_asks_xformers_nothing_and_is_zero():
    q, k, v = qkv()
    out = run_xformers(q, k, v, Padded([0, 0]))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("name", ONE_PIECE)
def test_fewer_queries_than_keys_attend_as_the_last_rows(name, queries):
    mask, (q, k, v) = MASKS[name], qkv()
    whole = attention(q, k, v, mask)
    torch.testing.assert_close(attention(q[:, -queries:], k, v, mask), whole[:, -queries:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["padded, all of a row", "left padded", "right padded"])
def test_rows_that_see_nobody_are_zero_with_finite_gradients(name, dtype):
    mask, (q, k, v) = MASKS[name], qkv(dtype=dtype)
    out = attention(q, k, v, mask)
    empty = ~mask.dense(B, L, L).any(-1).squeeze(1)
    assert empty.any()
    assert torch.equal(out[empty], torch.zeros_like(out[empty]))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@unfused
@pytest.mark.parametrize("mask", [Window(), Blind()])
def test_a_mask_of_ones_own_needs_allow_alone(mask, unchecked):
    q, k, v = qkv()
    allowed = mask.dense(B, L, L)
    assert not torch.equal(allowed, Causal().dense(B, L, L))
    same(attention(q, k, v, mask), formula(q, k, v, allowed), (q, k, v))
    q, k, v = (t.detach().float() for t in (q, k, v))
    torch.testing.assert_close(attention(q, k, v, mask, backend="flex"), formula(q, k, v, allowed))


# ----------------------------------------------------------------------------- what runs


@pytest.mark.parametrize("kv_heads", [H, 1])
@pytest.mark.parametrize(("dtype", "repeats"), [(torch.float32, 1), (torch.bfloat16, SHORT // L + 1)])
def test_causal_on_the_cpu_is_the_flash_kernel_and_views(dtype, repeats, kv_heads):
    q, k, v = (x.repeat(1, repeats, 1, 1) for x in qkv(kv_heads, dtype))
    with Operations() as ran:
        attention(q, k, v, Causal()).flatten(-2)  # B L H K -> B L (H K)
    assert set(ran.names) == {"transpose", "_scaled_dot_product_flash_attention_for_cpu", "detach", "view"}
    with Operations() as control:
        formula(q, k, v, Causal().dense(B, *[L * repeats] * 2)).transpose(1, 2).flatten(-2)
    assert {"clone", "_unsafe_view"} & set(control.names)  # positive control: a copy would be seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_rows_in_half_precision_run_in_float32_on_the_cpu_under_autocast_too(dtype):
    """Also closer to the truth: rounded once, at the end, in value and gradient."""
    q, k, v = (x.detach().requires_grad_() for x in qkv(dtype=dtype))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = formula(*wide, Causal().dense(B, L, L))
    with torch.autocast("cpu", dtype=dtype), Operations() as ran:
        out = attention(q, k, v, Causal())
    assert out.dtype == dtype
    assert ran.names.count("_to_copy") == 4  # q, k, v there and the output back
    assert torch.equal(out, exact.to(dtype))
    ours = torch.autograd.grad(out.sum(), (q, k, v))
    for own, true in zip(ours, torch.autograd.grad(exact.sum(), wide), strict=True):
        torch.testing.assert_close(own, true.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("masks", ["causal", "packed"])
def test_a_step_with_attention_compiles_into_one_graph(masks, unchecked):
    q, k, v = qkv(dtype=torch.float32)
    mask = MASKS[masks]
    attention(q, k, v, mask)  # lowers the mask, once a batch
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, mask), backend="aot_eager", fullgraph=True)
    same(compiled(q, k, v), attention(q, k, v, mask), (q, k, v))


def test_under_autocast_mixed_inputs_run_in_its_dtype():
    q, k, v = qkv(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q, k.bfloat16(), v, Causal()).dtype == torch.bfloat16


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("backend", "why"), [("xformers", "runs on cuda, not on cpu"), ("flex", "no backward pass"),
                                              ("flash", "runs on cuda, not on cpu"), ("sdp", "did you mean 'sdpa'"),
                                              ("cudnn", "runs on cuda, not on cpu")])
@pytest.mark.parametrize("mask", [Causal(), CleanNoisy(3)])
def test_a_forced_backend_that_cannot_run_says_why(backend, why, mask):
    with pytest.raises(UserError, match=why):
        attention(*qkv(), mask, backend=backend)


def test_flex_has_no_split_form_and_says_so(unchecked):
    with pytest.raises(UserError, match="split form, which flex does not offer"):
        attention(*(t.detach() for t in qkv()), CleanNoisy(3), backend="flex")


@pytest.mark.parametrize(("inputs", "mask", "why"), [
    (qkv(), CleanNoisy(7), "made for length 14, the keys have 6"),
    (qkv(queries=2), CleanNoisy(3), "needs 6 queries, clean then noisy; got 2"),
    (qkv(), Padded([1, 2, 3]), "made for 3 sequences, the batch has 2"),
    (qkv(kv_heads=3), Causal(), "4 query heads cannot share 3 key heads"),
    (qkv(queries=7), Causal(), "7 queries for 6 keys"),
    ([t.flatten(2) for t in qkv()], Causal(), r"got q \(2, 6, 32\)")])
def test_sizes_that_do_not_fit_are_refused_with_the_sizes(inputs, mask, why, unchecked):
    with pytest.raises(UserError, match=why):
        attention(*inputs, mask)


def test_the_report_names_what_can_train_here():
    report = available_backends("cpu")
    assert report["sdpa"] == ""
    assert "cuda" in report["xformers"]
    assert "backward" in report["flex"]
    if not torch.cuda.is_available():
        assert set(available_backends("cuda").values()) == {"this torch sees no CUDA device"}


# ----------------------------------------------------------------------------- SDPA with one kernel first


@pytest.mark.parametrize(("backend", "first"), [("flash", SDPBackend.FLASH_ATTENTION),
                                                ("cudnn", SDPBackend.CUDNN_ATTENTION)])
@pytest.mark.parametrize("name", ["causal", "packed"])
def test_the_chosen_kernel_comes_first_inside_sdpa_and_not_after(backend, first, name, monkeypatch):
    order, seen = torch._C._get_sdp_priority_order, []
    before, run = order(), torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *args, **kwargs: seen.append(order()[0]) or run(*args, **kwargs))
    q, k, v = qkv()
    out = RUN[backend](q, k, v, MASKS[name])
    assert seen == [int(first)]
    assert order() == before
    same(out, formula(q, k, v, MASKS[name].dense(B, L, L)), (q, k, v))  # all kernels may run, for masks it lacks


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_what_sdpas_own_check_declines_comes_with_its_reason(backend, monkeypatch):
    asked = []

    def check(params, debug):
        asked.append((params.query.shape[-1], params.query.dtype, params.is_causal))
        if (declines := params.query.shape[-1] > 256) and debug:
            warnings.warn("head dim is above 256 (Triggered internally at sdp_utils.cpp:1)", stacklevel=1)
        return not declines

    monkeypatch.setattr(torch.backends.cuda, f"can_use_{backend}_attention", check)
    sdpa_declines.cache_clear()
    with FakeTensorMode():
        assert reason_not(backend, MASKS["packed"], "cuda", torch.bfloat16, head_dim=64) == ""
        assert reason_not(backend, Causal(), "cuda", torch.float16, head_dim=320) == (
            f"torch's check of {backend} attention declines head dim 320 in float16 on this device: head dim is above "
            f"256")
        assert "takes float16 and bfloat16, not float32" in reason_not(backend, Causal(), "cuda", torch.float32)
    assert asked == [(64, torch.bfloat16, True), (320, torch.float16, True)]
    sdpa_declines.cache_clear()


# ----------------------------------------------------------------------------- what CUDA would run


@pytest.fixture
def pretend_gpu(monkeypatch, unchecked):
    """Make xformers' dispatch believe in a GPU of a capability, with or without flash attention built. Unchecked, since
    the query is only like a tensor."""

    def pretend(capability=(9, 0), flash=True, loaded=True):
        fmha = xformers_ops()
        monkeypatch.setattr(torch.version, "cuda", "12.8" if loaded else "99.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr("xformers.ops.fmha.common._built_with_cuda", loaded)
        for operator in (fmha.flash.FwOp, fmha.flash.BwOp):
            monkeypatch.setattr(operator, "is_available", classmethod(lambda cls: flash))
        xformers_operators.cache_clear()
        module._warn_once.cache_clear()

    with FakeTensorMode():
        yield pretend
    xformers_operators.cache_clear()
    module._warn_once.cache_clear()


class OnCuda:
    """What `resolve_backend` asks of a query, as if it lay on a CUDA device."""

    device, shape, requires_grad = torch.device("cuda"), (B, L, H, 64), True

    def __init__(self, dtype=torch.bfloat16, head_dim=64):
        self.dtype, self.shape = dtype, (B, L, H, head_dim)


@needs_xformers
@pytest.mark.parametrize("kind", [Full, Causal, Padded, Packed, CleanNoisy])
@pytest.mark.parametrize(("dtype", "flash", "expected"), [
    (torch.bfloat16, True, "fa2"), (torch.float16, True, "fa2"), (torch.float32, True, "cutlass"),
    (torch.bfloat16, False, "cutlass")])
def test_xformers_dispatches_an_operator_for_both_passes_of_each_mask(kind, dtype, flash, expected, pretend_gpu):
    pretend_gpu(flash=flash)
    operators, why = xformers_operators(kind, torch.device("cuda"), dtype, 64, True)
    assert [name.startswith(expected + way) for name, way in zip(operators, "FB", strict=True)] == [True, True], why


@needs_xformers
@pytest.mark.parametrize(("capability", "dtype", "head_dim", "why"), [
    ((9, 0), torch.bfloat16, 60, r"fa2F.*query.shape\[-1\] % 8 != 0"),
    ((10, 3), torch.float32, 64, r"cutlassF.*too new"),
    ((7, 5), torch.bfloat16, 64, r"cutlassF.*bf16 is only supported on A100"),
    ((9, 0), torch.float64, 64, "not float64")])
def test_what_xformers_declines_comes_with_its_reason(capability, dtype, head_dim, why, pretend_gpu):
    pretend_gpu(capability)
    with pytest.raises(UserError, match=why):
        resolve_backend("xformers", Causal(), OnCuda(dtype, head_dim))


@needs_xformers
@pytest.mark.parametrize(("mask", "query", "expected"), [
    (Causal(), OnCuda(), "xformers"), (MASKS["left padded"], OnCuda(), "xformers"),
    (MASKS["packed"], OnCuda(), "xformers"), (CleanNoisy(3), OnCuda(torch.float32), "xformers"),
    (Window(), OnCuda(), "flex"), (Blind(), OnCuda(), "flex"), (Window(), OnCuda(torch.float64), "sdpa"),
    (Causal(), OnCuda(torch.float64), "sdpa")])
def test_on_cuda_xformers_comes_first_then_flex_for_masks_it_lacks(mask, query, expected, pretend_gpu, monkeypatch):
    pretend_gpu()
    monkeypatch.setattr("looped.nn.backends.importlib.util.find_spec", lambda name: name)  # triton is there
    with warnings.catch_warnings():
        warnings.simplefilter("error" if expected == "xformers" else "ignore")
        assert resolve_backend("auto", mask, query) == expected


@needs_xformers
def test_a_fallback_on_cuda_is_announced_once_and_names_both(pretend_gpu, monkeypatch):
    pretend_gpu()
    monkeypatch.setattr("looped.nn.backends.importlib.util.find_spec", lambda name: name)
    resolve = functools.partial(resolve_backend, "auto", Window(), OnCuda())
    with pytest.warns(UserWarning, match="from xformers to flex: xformers has no bias class for Window"):
        resolve()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve()


@needs_xformers
def test_an_xformers_for_another_cuda_is_announced_once_for_all_masks(pretend_gpu, monkeypatch):
    pretend_gpu(loaded=False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "triton" else find_spec(name))
    why = r"is built for CUDA [\d.]+ and torch brings CUDA 99.0, .*; pip install .*/whl/cu990$"
    with pytest.warns(UserWarning, match=rf"^attention runs without xformers, .*: xformers [\d.]+ {why}") as said:
        assert [resolve_backend("auto", mask, OnCuda()) for mask in (Causal(), MASKS["packed"])] == ["sdpa", "flex"]
    assert len(said) == 1
    with pytest.raises(UserError, match=r"'xformers' cannot run: xformers .* is built for CUDA"):
        resolve_backend("xformers", Causal(), OnCuda())


@needs_xformers
@pytest.mark.parametrize(("name", "flex"), [("causal", False), ("packed", False), ("same document, causal", True)])
def test_in_a_compiled_graph_on_cuda_nothing_is_asked(name, flex, pretend_gpu, monkeypatch):
    """One graph, by what was resolved before it; xformers cannot be traced, so SDPA stands in."""
    pretend_gpu()
    monkeypatch.setattr("looped.nn.backends.importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(module, "_resolved", {})
    mask, q = MASKS[name], torch.empty(B, L, H, 64, device="cuda", dtype=torch.bfloat16)
    ran = []
    for backend in RUN:
        monkeypatch.setitem(module.RUN, backend, lambda q, k, v, mask, backend=backend: ran.append(backend) or q + k)

    def compiled(backend="auto"):
        torch._dynamo.reset()
        torch.compile(lambda q: attention(q, q, q, mask, backend=backend), fullgraph=True, backend="eager")(q)
        return ran[-1]

    assert compiled() == "sdpa"  # nothing is known yet
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eager = resolve_backend("auto", mask, q)
    assert eager == ("flex" if flex else "xformers")
    monkeypatch.setattr(module, "reason_not", lambda *_, **__: pytest.fail("asked inside the graph"))
    assert compiled() == ("flex" if flex else "sdpa")
    assert compiled("flash") == "flash"
    with pytest.raises(pytest.fail.Exception):
        attention(q, q, q, mask)  # positive control: outside of a graph it is asked


@needs_xformers
@pytest.mark.parametrize("backend", ["auto", "flash", "cudnn", "sdpa"])
def test_attention_on_cuda_is_one_graph_with_the_real_calls(backend, pretend_gpu):
    pretend_gpu()
    mask, q = MASKS["causal"], torch.empty(B, L, H, 64, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: attention(q, q, q, mask, backend=backend), fullgraph=True,
                             backend="aot_eager")
    assert (compiled(q).shape, compiled(q).device.type) == (q.shape, "cuda")


@needs_xformers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_bias_class_in_use_is_on_both_operators_lists(dtype):
    """Forward and backward, flash and CUTLASS: no mask trains under one kernel and fails under the other."""
    fmha = xformers_ops()
    bias, operators = fmha.attn_bias, [fmha.cutlass.FwOp, fmha.cutlass.BwOp]
    if dtype != torch.float32:
        operators += [fmha.flash.FwOp, fmha.flash.BwOp, fmha.flash3.FwOp, fmha.flash3.BwOp]
    used = {type(None), bias.LowerTriangularMask, bias.LowerTriangularFromBottomRightMask, bias.BlockDiagonalMask,
            bias.BlockDiagonalCausalMask, bias.BlockDiagonalCausalFromBottomRightMask}
    for operator in operators:
        assert dtype in operator.SUPPORTED_DTYPES
        assert used <= set(operator.SUPPORTED_ATTN_BIAS_TYPES)


@pytest.mark.parametrize(("dtype", "mask", "expected"), [
    (torch.bfloat16, Window(), ""), (torch.float64, Window(), "not float64"), (torch.bfloat16, CleanNoisy(3), "split")])
def test_flex_on_cuda_says_what_it_takes(dtype, mask, expected, monkeypatch):
    monkeypatch.setattr("looped.nn.backends.importlib.util.find_spec", lambda name: name)
    reason = reason_not("flex", mask, "cuda", dtype, needs_gradient=True)
    assert expected in reason
    assert bool(reason) == bool(expected)
