"""On a CUDA device: xformers and flex against SDPA's dense form, values and gradients, and which operator runs."""

import pytest
import torch

from looped.nn.attention import attention, context_attention
from looped.nn.backends import dispatched_operator, xformers_ops
from looped.nn.bias import Causal, CleanNoisy, Full, Packed, Padded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

B, L, H, K = 2, 128, 4, 64
DOCUMENTS = torch.arange(L).div(40, rounding_mode="floor").expand(B, L)
MASKS = {"full": Full(), "causal": Causal(), "packed": Packed(DOCUMENTS), "clean|noisy": CleanNoisy(L // 2),
         "clean|noisy, strict": CleanNoisy(L // 2, strict=True),
         "padded": Padded.from_lengths(torch.tensor([100, 128]), L)}


def draw(dtype, kv_heads=H, count=3):
    shapes = [(B, L, H, K)] + [(B, L, kv_heads, K)] * (count - 1)
    return [torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]


def compare(run, oracle, inputs, tolerance):
    ours, theirs = run(*inputs), oracle(*[t.detach().double().requires_grad_() for t in inputs])
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("name", MASKS)
def test_the_default_backend_equals_float64_sdpa(name, kv_heads, dtype):
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    mask = MASKS[name]
    compare(lambda q, k, v: attention(q, k, v, mask),
            lambda q, k, v: attention(q.cpu(), k.cpu(), v.cpu(), mask).cuda(), draw(dtype, kv_heads), tolerance)


@pytest.mark.parametrize("strict", [False, True])
def test_context_attention_gradients_equal_float64_on_the_cpu(strict):
    inputs = draw(torch.float32, count=5)
    cpu = [t.detach().double().cpu().requires_grad_() for t in inputs]
    ours = torch.autograd.grad(context_attention(*inputs, strict=strict).sum(), inputs)
    theirs = torch.autograd.grad(context_attention(*cpu, strict=strict).sum(), cpu)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", ["full", "causal", "packed"])
def test_xformers_has_an_operator_for_every_class_it_is_given(name):
    if xformers_ops() is None:
        pytest.skip("xformers is not installed")
    q, k, v = (t.flatten(0, 1)[None] if name == "packed" else t for t in draw(torch.bfloat16))
    operator, reasons = dispatched_operator(q, k, v, MASKS[name])
    assert operator, reasons
