"""The attention backends: which can run what, and why not; the only file that knows xformers and flex.

xformers and flex are imported on first use. A backend's `reason` is an empty string when it can run.
"""

import functools
import importlib.util
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from looped.nn.bias import Causal, CleanNoisy, Full, Mask, Packed

BACKENDS = ("xformers", "sdpa", "flex")
HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def xformers_ops():
    """The module `xformers.ops.fmha`, or None where it is not installed. Its notice about builds is kept quiet: what
    can run is asked for each call."""
    if importlib.util.find_spec("xformers") is None:
        return None
    import logging

    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from xformers.ops import fmha
    finally:
        logger.setLevel(level)
    return fmha


_LOWERED: "weakref.WeakKeyDictionary[Mask, dict]" = weakref.WeakKeyDictionary()


def lowered(mask: Mask, *key: Any, make: Callable[[], Any]) -> Any:
    """A backend's form of a mask, made once for all layers and loop steps that use the same mask object."""
    forms = _LOWERED.setdefault(mask, {})
    if key not in forms:
        forms[key] = make()
    return forms[key]


def reason_not(backend: str, mask: Mask, device: torch.device | str, dtype: torch.dtype, *,
               needs_gradient: bool = False) -> str:
    """Why `backend` cannot run this, or an empty string."""
    device = torch.device(device).type
    return {"xformers": _xformers_reason, "sdpa": _sdpa_reason, "flex": _flex_reason}[backend](
        mask, device, dtype, needs_gradient)


def _sdpa_reason(mask: Mask, device: str, dtype: torch.dtype, needs_gradient: bool) -> str:
    return ""


def _xformers_reason(mask: Mask, device: str, dtype: torch.dtype, needs_gradient: bool) -> str:
    if device != "cuda":
        return f"xformers' attention runs on CUDA, not on {device}"
    if dtype not in HALF_AND_SINGLE:
        return f"xformers' attention takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if not isinstance(mask, Full | Causal | Packed | CleanNoisy):
        return f"xformers has no bias class for {type(mask).__name__}"
    return "" if xformers_ops() is not None else "xformers is not installed; pip install xformers"


def _flex_reason(mask: Mask, device: str, dtype: torch.dtype, needs_gradient: bool) -> str:
    if isinstance(mask, CleanNoisy):
        return "clean|noisy runs in its split form, which flex does not offer"
    if device == "cuda":
        return ""
    return f"flex attention has no backward pass on {device}" if needs_gradient else ""


# ----------------------------------------------------------------------------- xformers


def xformers_bias(mask: Mask, num_queries: int, num_keys: int):
    """The `AttentionBias` (or None for full attention) that says the same as `mask`."""
    bias = xformers_ops().attn_bias
    if isinstance(mask, Full):
        return None
    if isinstance(mask, Causal):
        same = num_queries == num_keys
        return bias.LowerTriangularMask() if same else bias.LowerTriangularFromBottomRightMask()
    assert isinstance(mask, Packed), mask
    kind = bias.BlockDiagonalCausalMask if mask.causal else bias.BlockDiagonalMask
    return kind.from_seqlens(mask.run_lengths())


def run_xformers(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    sizes = q.shape[1], k.shape[1]
    bias = lowered(mask, "xformers", *sizes, make=lambda: xformers_bias(mask, *sizes))
    k, v = expand_heads(k, q.shape[2]), expand_heads(v, q.shape[2])
    if not isinstance(mask, Packed):
        return xformers_ops().memory_efficient_attention(q, k, v, attn_bias=bias)
    flat = [t.flatten(0, 1).unsqueeze(0) for t in (q, k, v)]  # B L H K -> 1 (B L) H K
    return xformers_ops().memory_efficient_attention(*flat, attn_bias=bias).view(q.shape)


def dispatched_operator(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[str, list[str]]:
    """(name of xformers' operator for these inputs, []) or ("", why each operator declines)."""
    fmha = xformers_ops()
    inputs = fmha.Inputs(query=q, key=k, value=v, attn_bias=xformers_bias(mask, q.shape[1], k.shape[1]))
    reasons = []
    for op in fmha.ALL_FW_OPS:
        declined = op.not_supported_reasons(inputs)
        if not declined:
            return op.NAME, []
        reasons.append(f"{op.NAME}: {'; '.join(declined)}")
    return "", reasons


# ----------------------------------------------------------------------------- SDPA and flex


def run_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    num_queries, num_keys = q.shape[1], k.shape[1]
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # B L H K -> B H L K, as views
    options: dict = {"enable_gqa": grouped}
    if isinstance(mask, Causal) and num_queries == num_keys:
        options["is_causal"] = True
    elif not isinstance(mask, Full) and not (isinstance(mask, Causal) and num_queries == 1):
        options["attn_mask"] = lowered(mask, "dense", num_queries, num_keys, q.device,
                                       make=lambda: mask.dense(num_queries, num_keys, device=q.device))
    out = F.scaled_dot_product_attention(q, k, v, **options)
    if "attn_mask" in options and not isinstance(mask, Causal):
        # Kernels differ on rows that see nobody (NaN, or the mean of v): the answer here is zero.
        out = out.masked_fill(~options["attn_mask"].any(-1, keepdim=True), 0)
    return out.transpose(1, 2)


def flex_block_mask(mask: Mask, num_queries: int, num_keys: int, device: torch.device):
    """The `BlockMask` of flex attention; a closure, since flex rejects bound methods."""
    from torch.nn.attention.flex_attention import create_block_mask

    offset = num_keys - num_queries

    def allow(b, h, q, k):
        return mask.allow(b, q + offset, k)

    batch = mask.batch if mask.batch > 1 else None
    return create_block_mask(allow, batch, None, num_queries, num_keys, device=device)


def run_flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    sizes = q.shape[1], k.shape[1], q.device
    block_mask = lowered(mask, "flex", *sizes, make=lambda: flex_block_mask(mask, *sizes))
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    run = torch.compile(flex_attention) if q.is_cuda else flex_attention
    return run(q, k, v, block_mask=block_mask, enable_gqa=grouped).transpose(1, 2)


RUN = {"xformers": run_xformers, "sdpa": run_sdpa, "flex": run_flex}


def expand_heads(x: Tensor, num_heads: int) -> Tensor:
    """Show each of G key or value heads to its H / G query heads; a view with stride 0 where G = 1."""
    if x.shape[2] == num_heads:
        return x
    groups = num_heads // x.shape[2]
    return x.unsqueeze(3).expand(-1, -1, -1, groups, -1).flatten(2, 3)  # B L G K -> B L (G n) K


# ----------------------------------------------------------------------------- causal kernels with log-sum-exp


def has_causal_kernel(x: Tensor) -> bool:
    """Whether `causal_forward` runs on this device and dtype."""
    if x.device.type == "cpu":
        return x.dtype in (*HALF_AND_SINGLE, torch.float64)
    return not _xformers_reason(Causal(), x.device.type, x.dtype, True)


def causal_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of equal lengths and heads: (out (B, L, H, K), log-sum-exp of the scaled scores (B, H, L))."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(t.transpose(1, 2) for t in (q, k, v)), 0.0, True)
        return out.transpose(1, 2), lse
    fmha = xformers_ops()
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, fmha.LowerTriangularMask())
    return out, lse[..., : q.shape[1]]


def causal_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """(dq, dk, dv) of `causal_forward`, for any `out` and `lse` that softmax over these and further keys gave."""
    if q.device.type == "cpu":
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(t.transpose(1, 2) for t in (grad, q, k, v, out)), lse, 0.0, True)
        return tuple(g.transpose(1, 2) for g in grads)
    fmha = xformers_ops()
    return fmha.memory_efficient_attention_backward(grad, out, lse.contiguous(), q, k, v, fmha.LowerTriangularMask())
