"""Causal attention by direct calls of the kernels of each backend: forward with log-sum-exp, and backward.

attention.py merges each row's own key into their softmax (`context_attention`), which needs the log-sum-exp, and a
backward that takes the merged one; SDPA and xformers' own autograd give neither.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from looped.nn.backends import FIRST, HALF_AND_SINGLE, expand_heads, sum_heads, xformers_ops


class CausalKernel(NamedTuple):
    """Causal attention with as many queries as keys: forward and backward, outside autograd. Layout (B, L, H or G, K).

    forward(q, k, v) -> out, lse (B, H, L): the log-sum-exp of the scaled scores.
    backward(grad, q, k, v, out, lse) -> dq, dk, dv; `out` and `lse` may come from a softmax over more keys than these.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def causal_kernel(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> CausalKernel | None:
    """The kernel of a backend, or None if it has none for this device, dtype and head dim.

    CUDA's kernels called directly take rows of whole 16-byte words (SDPA pads others, by a copy), and flash heads of at
    most 256. xformers has been asked by `reason_not` before. There is no direct call of cuDNN's, so flash stands in.
    """
    if backend == "xformers":
        return CausalKernel(_xformers_forward, _xformers_backward)
    if device.type == "cpu" and dtype in (*HALF_AND_SINGLE, torch.float64):
        return CausalKernel(_cpu_forward, _cpu_backward)
    if device.type != "cuda" or dtype not in HALF_AND_SINGLE or head_dim * dtype.itemsize % 16:
        return None
    if backend in FIRST and head_dim <= 256:
        return CausalKernel(_flash_forward, _flash_backward)
    return CausalKernel(_efficient_forward, _efficient_backward)


def _cpu_forward(q, k, v):
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(t.transpose(1, 2) for t in (q, k, v)), 0.0, True)
    return out.transpose(1, 2), lse


def _cpu_backward(grad, q, k, v, out, lse):
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(t.transpose(1, 2) for t in (grad, q, k, v, out)), lse, 0.0, True)
    return tuple(g.transpose(1, 2) for g in grads)


def _xformers_forward(q, k, v):
    fmha = xformers_ops()
    k, v = expand_heads(k, q.shape[2]), expand_heads(v, q.shape[2])
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, fmha.LowerTriangularMask())
    return out, lse[..., : q.shape[1]]  # one operator pads the log-sum-exp


def _xformers_backward(grad, q, k, v, out, lse):
    fmha, heads, kv_heads = xformers_ops(), q.shape[2], k.shape[2]
    k, v = expand_heads(k, heads), expand_heads(v, heads)
    dq, dk, dv = fmha.memory_efficient_attention_backward(grad, out, lse, q, k, v, fmha.LowerTriangularMask())
    return dq, sum_heads(dk, kv_heads), sum_heads(dv, kv_heads)


def _flash_forward(q, k, v):
    k, v = expand_heads(k, q.shape[2]), expand_heads(v, q.shape[2])
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), 0.0, True)
    return out.transpose(1, 2), lse


def _flash_backward(grad, q, k, v, out, lse):
    heads, kv_heads, length = q.shape[2], k.shape[2], q.shape[1]
    k, v = expand_heads(k, heads), expand_heads(v, heads)
    unused = [torch.zeros(shape, dtype=torch.uint64, device=q.device) for shape in (2, ())]  # dropout's random state
    dq, dk, dv = (t.transpose(1, 2) for t in torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *(t.transpose(1, 2) for t in (grad, q, k, v, out)), lse, None, None, length, length, 0.0, True, *unused))
    return dq, sum_heads(dk, kv_heads), sum_heads(dv, kv_heads)


_TOP_LEFT, _LSE_ALIGNMENT = 1, 32  # constants of aten's memory-efficient kernel


def _efficient_forward(q, k, v):
    k, v = expand_heads(k, q.shape[2]), expand_heads(v, q.shape[2])
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(
        q, k, v, None, None, None, None, None, 0.0, _TOP_LEFT, True)
    return out, lse[..., : q.shape[1]]


def _efficient_backward(grad, q, k, v, out, lse):
    heads, kv_heads, length = q.shape[2], k.shape[2], q.shape[1]
    k, v = expand_heads(k, heads), expand_heads(v, heads)
    lse = F.pad(lse, (0, -length % _LSE_ALIGNMENT), value=torch.inf)
    unused = torch.empty(0, dtype=torch.long, device=q.device)  # dropout's random state; there is no dropout
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        grad, q, k, v, None, out, None, None, length, length, lse, 0.0, unused, unused, _TOP_LEFT, False)
    return dq, sum_heads(dk, kv_heads), sum_heads(dv, kv_heads)
