"""On a CUDA device: every mask and backend against float64 on the CPU, values and gradients, and the memory taken.

Run with `pytest -m gpu tests/nn/test_attention_gpu.py`.
"""

import pytest
import torch
from attention_oracle import draw

from looped.nn.attention import attention, available_backends, context_attention, resolve_backend
from looped.nn.masks import Causal, CleanNoisy, Full, Mask, Packed, Padded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
              pytest.mark.filterwarnings("ignore:attention falls back"),
              pytest.mark.usefixtures("unchecked")]  # flex compiles the mask with its kernel


class Window(Mask):
    """No xformers class says this: flex's part."""

    def allow(self, q, k, b=0):
        return (k <= q) & (k >= q - 20)


B, L, H, K = 2, 200, 4, 64  # a length that no kernel's tile divides
MASKS = {"full": Full(), "causal": Causal(), "packed": Packed(((40, 60, 100), (199, 1))),
         "packed, full": Packed(((40, 60, 100), (199, 1)), causal=False), "right padded": Padded([150, 200]),
         "left padded": Padded([150, 0], side="left", width=L), "padded, full": Padded([150, 200], causal=False),
         "window": Window(), "clean|noisy": CleanNoisy(L // 2), "clean|noisy, strict": CleanNoisy(L // 2, strict=True)}
TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # float32 may run in TF32


def inputs(dtype, kv_heads=H, queries=L, count=3):
    """q, then key-like tensors."""
    shapes = [(B, queries, H, K)] + [(B, L, kv_heads, K)] * (count - 1)
    return [draw(*shape, dtype=dtype, seed=i).detach().cuda().requires_grad_() for i, shape in enumerate(shapes)]


def compare(run, given):
    """Values and gradients of `run` on the GPU against the same in float64 on the CPU, relative to their norm."""
    exact = [t.detach().cpu().double().requires_grad_() for t in given]
    ours, theirs = run(*given), run(*exact)
    grad = draw(*theirs.shape, dtype=given[0].dtype, seed=9).detach()
    pairs = zip((ours, *torch.autograd.grad(ours, given, grad.cuda())),
                (theirs, *torch.autograd.grad(theirs, exact, grad.double())), strict=True)
    for a, b in pairs:
        assert (a.cpu().double() - b).norm() <= TOLERANCE[given[0].dtype] * b.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("name", MASKS)
def test_the_default_backend_equals_float64_in_value_and_gradient(name, kv_heads, dtype):
    compare(lambda q, k, v: attention(q, k, v, MASKS[name]), inputs(dtype, kv_heads))


@pytest.mark.parametrize("backend", ["xformers", "sdpa", "flex"])
@pytest.mark.parametrize("name", ["full", "causal", "packed", "left padded"])
def test_each_backend_equals_float64_in_value_and_gradient(name, backend):
    given, mask = inputs(torch.bfloat16), MASKS[name]
    if backend == "xformers" and (reason := available_backends("cuda", torch.bfloat16, mask)[backend]):
        pytest.skip(reason)
    compare(lambda q, k, v: attention(q, k, v, mask, backend=backend if q.is_cuda else "auto"), given)


@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("name", ["causal", "packed", "right padded", "padded, full"])
def test_a_few_rows_at_the_end_of_a_cache_equal_the_cpu(name, queries, kv_heads):
    q, k, v = (t.detach() for t in inputs(torch.float16, kv_heads, queries))
    ours = attention(q, k, v, MASKS[name])
    theirs = attention(q.cpu().double(), k.cpu().double(), v.cpu().double(), MASKS[name])
    assert (ours.cpu().double() - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_that_see_nobody_are_zero(dtype):
    out = attention(*inputs(dtype), MASKS["left padded"])
    assert torch.equal(out[1], torch.zeros_like(out[1]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("strict", [False, True])
def test_context_attention_equals_float64_in_value_and_gradient(strict, kv_heads, backend, dtype):
    compare(lambda *given: context_attention(*given, strict=strict, backend=backend), inputs(dtype, kv_heads, count=5))


def test_context_attention_takes_memory_linear_in_the_length():
    def peak(length):
        given = [torch.randn(1, length, 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                 for _ in range(5)]
        torch.cuda.reset_peak_memory_stats()
        context_attention(*given).sum().backward()
        return torch.cuda.max_memory_allocated()

    peak(1024)
    assert peak(32768) < 32768**2  # a byte a pair would be more


def test_xformers_is_the_backend_where_it_can_run():
    q, k, v = inputs(torch.bfloat16)
    for mask in (MASKS["causal"], MASKS["packed"], MASKS["left padded"], MASKS["clean|noisy"]):
        if reason := available_backends("cuda", torch.bfloat16, mask)["xformers"]:
            pytest.skip(reason)
        assert resolve_backend("auto", mask, q, k, v) == "xformers"
    assert resolve_backend("auto", MASKS["window"], q, k, v) == "flex"
