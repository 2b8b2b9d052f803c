"""Attention to a clean context plus oneself, and clean|noisy built on it: exact, and never a square tensor."""

import functools
import inspect

import pytest
import torch
from attention_oracle import Operations, draw, formula, kernel_stand_in, same
from hypothesis import given, settings
from hypothesis import strategies as st

from looped.errors import UserError
from looped.nn import attention as module
from looped.nn import backends, causal_kernels
from looped.nn.attention import attention, context_attention
from looped.nn.masks import CleanNoisy

B, L, H, K = 2, 6, 4, 8


def inputs(length=L, kv_heads=H, dtype=torch.float64, batch=B, dim=K, heads=H):
    """q, k_context, v_context, k_own, v_own."""
    shapes = [(batch, length, heads, dim)] + [(batch, length, kv_heads, dim)] * 4
    return [draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def joint(q, k, v, k_own, v_own, strict):
    """The same as dense attention over [context; own] with the 2L-wide mask."""
    n, m = q.shape[1], k.shape[1]
    seen = torch.ones(n, m, dtype=torch.bool).tril(m - n - int(strict))
    allowed = torch.cat([seen, torch.eye(n, dtype=torch.bool)], 1)
    return formula(q, torch.cat([k, k_own], 1), torch.cat([v, v_own], 1), allowed)


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("strict", [False, True])
def test_it_is_exact_in_value_and_gradient(strict, kv_heads, length):
    given_ = inputs(length, kv_heads)
    same(context_attention(*given_, strict=strict), joint(*given_, strict), given_)


@pytest.mark.parametrize("strict", [False, True])
def test_gradcheck_in_float64(strict):
    given_ = inputs(length=4, kv_heads=1, batch=1, heads=2, dim=3)
    assert torch.autograd.gradcheck(functools.partial(context_attention, strict=strict), given_)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 40), kv_heads=st.sampled_from([1, 2]), groups=st.integers(1, 3),
       dim=st.sampled_from([1, 3, 8, 17]), strict=st.booleans(), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_it_is_exact_for_any_shape_and_sharpness(length, kv_heads, groups, dim, strict, scale):
    given_ = [scale * t.detach() for t in inputs(length, kv_heads, batch=1, dim=dim, heads=kv_heads * groups)]
    given_ = [t.requires_grad_() for t in given_]
    same(context_attention(*given_, strict=strict), joint(*given_, strict), given_, rtol=1e-8, atol=1e-9 * scale**2)


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("strict", [False, True])
def test_a_few_new_rows_equal_the_whole_in_value_and_gradient(strict, kv_heads, queries):
    q, k, v, k_own, v_own = inputs(kv_heads=kv_heads)
    whole = context_attention(q, k, v, k_own, v_own, strict=strict)[:, -queries:]
    part = context_attention(q[:, -queries:], k, v, k_own[:, -queries:], v_own[:, -queries:], strict=strict)
    same(part, whole, (q, k, v, k_own, v_own))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_within_twice_the_formulas_error(dtype, strict):
    low = inputs(64, dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in low]
    grad = draw(B, 64, H, K, dtype=dtype, seed=9).detach()
    exact, plain, ours = joint(*wide, strict), joint(*low, strict), context_attention(*low, strict=strict)
    results = [(out, *torch.autograd.grad(out, given_, grad.to(out.dtype)))
               for out, given_ in ((exact, wide), (plain, low), (ours, low))]
    for true, formulas, value in zip(*results, strict=True):
        assert (value - true).norm() <= 2 * (formulas - true).norm() + 1e-6 * true.norm()


def test_a_constant_input_is_not_differentiated_for_and_changes_nothing():
    given_ = inputs()
    ours = [t.detach() if i in (1, 2) else t for i, t in enumerate(given_)]
    wanted = [given_[i] for i in (0, 3, 4)]
    same(context_attention(*ours), joint(*given_, False), wanted)


@pytest.mark.parametrize("name", ["xformers", "efficient", "flash"])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("strict", [False, True])
def test_what_the_cuda_kernels_are_asked_is_exact(strict, kv_heads, name, monkeypatch):
    """The kernels themselves replaced by their formulas: slices, grouped heads and padded log-sum-exps fit together."""
    kernel = kernel_stand_in()
    if name == "xformers":
        if (fmha := backends.xformers_ops()) is None:
            pytest.skip("xformers is not installed")
        monkeypatch.setattr(fmha, "memory_efficient_attention_forward_requires_grad",
                            lambda q, k, v, bias: padded(*kernel.forward(q, k, v)))
        monkeypatch.setattr(fmha, "memory_efficient_attention_backward",
                            lambda grad, out, lse, q, k, v, bias: kernel.backward(grad, q, k, v, out, lse))
        chosen = causal_kernels.CausalKernel(causal_kernels._xformers_forward, causal_kernels._xformers_backward)
    elif name == "flash":
        turned = functools.partial(map, lambda t: t.transpose(1, 2))  # B L H K <-> B H L K

        def forward(q, k, v, dropout, causal):
            out, lse = kernel.forward(*turned((q, k, v)))
            return out.transpose(1, 2), lse, None

        def backward(grad, q, k, v, out, lse, *rest):
            return tuple(turned(kernel.backward(*turned((grad, q, k, v, out)), lse)))

        monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", forward)
        monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_backward", backward)
        chosen = causal_kernels.CausalKernel(causal_kernels._flash_forward, causal_kernels._flash_backward)
    else:
        monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward",
                            lambda q, k, v, *rest: (*padded(*kernel.forward(q, k, v)), None))
        monkeypatch.setattr(torch.ops.aten, "_efficient_attention_backward",
                            lambda grad, q, k, v, bias, out, s, t, m, n, lse, *rest:
                            (*kernel.backward(grad, q, k, v, out, unpadded(lse, q)), None))
        chosen = causal_kernels.CausalKernel(causal_kernels._efficient_forward, causal_kernels._efficient_backward)
    monkeypatch.setattr(module, "causal_kernel", lambda *_: chosen)
    given_ = inputs(kv_heads=kv_heads)
    same(context_attention(*given_, strict=strict), joint(*given_, strict), given_)


def padded(out, lse):
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)


def unpadded(lse, q):
    assert lse.shape[-1] == 32
    assert torch.isinf(lse[..., q.shape[1] :]).all()  # rows of padding then have no probability
    return lse[..., : q.shape[1]]


@pytest.mark.parametrize("length", [50, 64])
@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_torchs_own_cuda_kernels_accept_the_call_and_give_the_shapes(backend, length):
    q, k = (torch.empty(B, length, heads, 64, device="meta", dtype=torch.bfloat16) for heads in (H, 2))
    kernel = causal_kernels.causal_kernel(backend, torch.device("cuda"), q.dtype, 64)
    out, lse = kernel.forward(q, k, k)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (B, H, length), torch.float32)
    assert [g.shape for g in kernel.backward(out, q, k, k, out, lse)] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize(("backend", "dtype", "head_dim", "kernel"), [
    ("sdpa", torch.bfloat16, 64, "_efficient_forward"), ("sdpa", torch.bfloat16, 60, None),
    ("sdpa", torch.float32, 60, "_efficient_forward"), ("sdpa", torch.float32, 30, None),
    ("flash", torch.bfloat16, 256, "_flash_forward"), ("flash", torch.bfloat16, 60, None),
    ("cudnn", torch.bfloat16, 64, "_flash_forward"), ("flash", torch.float16, 320, "_efficient_forward")])
def test_a_kernel_of_cuda_takes_rows_of_whole_16_byte_words(backend, dtype, head_dim, kernel):
    found = causal_kernels.causal_kernel(backend, torch.device("cuda"), dtype, head_dim)
    assert kernel == (found and found.forward.__name__)


def test_on_cuda_a_head_dim_that_no_kernel_takes_runs_the_formula(monkeypatch):
    """By what CUDA would choose, on the CPU, which does not have its kernels."""
    chosen = causal_kernels.causal_kernel
    monkeypatch.setattr(module, "causal_kernel", lambda name, device, *rest: chosen(name, torch.device("cuda"), *rest))
    module._warn_once.cache_clear()
    given_ = inputs(dtype=torch.float32, dim=6)
    with pytest.warns(UserWarning, match="no causal kernel .* for torch.float32 and head dim 6"):
        out = context_attention(*given_)
    same(out, joint(*given_, False), given_, rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="_efficient_attention_forward"):  # positive control: this one has one
        context_attention(*inputs(dtype=torch.float32, dim=8))


def test_without_a_causal_kernel_the_formula_runs_and_says_so(monkeypatch):
    monkeypatch.setattr(module, "causal_kernel", lambda *_: None)
    module._warn_once.cache_clear()
    given_ = inputs()
    with pytest.warns(UserWarning, match="plain formula, length x length"):
        out = context_attention(*given_)
    same(out, joint(*given_, False), given_)


def test_it_compiles_into_one_graph(monkeypatch, unchecked):
    # even unchecked, the wrapper around a dataclass's __init__ cannot be traced
    monkeypatch.setattr(CleanNoisy, "__init__", inspect.unwrap(CleanNoisy.__init__))
    given_ = inputs(dtype=torch.float32)
    compiled = torch.compile(context_attention, backend="aot_eager", fullgraph=True)
    same(compiled(*given_), context_attention(*given_), given_)


def test_under_autocast_it_runs_in_its_dtype():
    given_ = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = context_attention(*given_)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), given_))


@pytest.mark.parametrize(("cut", "why"), [
    (lambda q, k, v, *own: (q, k[:, :3], v[:, :3], *own), "6 queries, 6 own keys, 3 context rows"),
    (lambda q, k, v, k_own, v_own: (q[:, :2], k, v, k_own, v_own), "2 queries, 6 own keys, 6 context rows"),
    (lambda q, k, v, *own: (q[..., :3, :], k, v, *own), "3 query heads cannot share 4 key heads")])
def test_rows_that_do_not_fit_are_refused_with_the_sizes(cut, why, unchecked):
    with pytest.raises(UserError, match=why):
        context_attention(*cut(*inputs()))


# ----------------------------------------------------------------------------- memory


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kv_heads", [H, 1])
def test_only_the_inputs_the_output_and_its_log_sum_exp_are_kept(strict, kv_heads):
    kept = []
    given_ = inputs(32, kv_heads, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = context_attention(*given_, strict=strict)
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in (*given_, out)) + B * 32 * H


@pytest.mark.parametrize("strict", [False, True])
def test_clean_noisy_makes_and_keeps_no_square_tensor(strict):
    length, kept = 256, []
    q, k, v = (draw(1, 2 * length, 1, 4, dtype=torch.float32, seed=s) for s in range(3))
    with Operations() as ours, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t,
                                                                        lambda t: t):
        attention(q, k, v, CleanNoisy(length, strict=strict)).sum().backward()
    with Operations() as dense:
        formula(q, k, v, CleanNoisy(length, strict=strict).dense(1, 2 * length, 2 * length))
    assert dense.elements >= (2 * length) ** 2  # positive control: the formula makes it
    assert ours.elements < length**2
    assert max(kept) < length**2


# ----------------------------------------------------------------------------- clean|noisy


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("strict", [False, True])
def test_the_split_form_equals_dense_clean_noisy_attention(strict, kv_heads, dtype, tolerance):
    length = 33
    mask = CleanNoisy(length, strict=strict)
    q, k, v = inputs(2 * length, kv_heads, dtype)[:3]
    dense = formula(q, k, v, mask.dense(B, 2 * length, 2 * length))
    same(attention(q, k, v, mask), dense, (q, k, v), rtol=tolerance, atol=tolerance)
