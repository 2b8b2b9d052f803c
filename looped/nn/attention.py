"""Attention for loop models: one call for every mask and backend, and attention to a clean context plus oneself.

Layout (batch, length, heads, head dim), as in xformers. Keys and values may have fewer heads than queries.
"""

import functools
import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from looped.errors import UserError, did_you_mean
from looped.nn.backends import (
    BACKENDS,
    RUN,
    causal_backward,
    causal_forward,
    expand_heads,
    has_causal_kernel,
    reason_not,
)
from looped.nn.bias import Causal, CleanNoisy, Mask

Query = Float[Tensor, "batch queries heads dim"]
KeyValue = Float[Tensor, "batch keys kv_heads dim"]


def attention(q: Query, k: KeyValue, v: KeyValue, mask: Mask, *, backend: str = "auto") -> Query:
    """softmax(q k / sqrt(K)) v over the keys that `mask` allows; rows that see nobody are zero.

    `auto`: xformers on CUDA, flex for CUDA masks that xformers has no class for, SDPA elsewhere. Raises `UserError`
    for a named backend that cannot run, with the reason.
    """
    if mask.batch not in (1, q.shape[0]):
        raise UserError(f"the mask is made for {mask.batch} rows, the batch has {q.shape[0]}; make one for this batch")
    if isinstance(mask, CleanNoisy):
        return _clean_noisy(q, k, v, mask, backend)
    return RUN[resolve_backend(backend, mask, q)](q, k, v, mask)


def resolve_backend(backend: str, mask: Mask, q: Query) -> str:
    """The backend that will run; announces once when it is not the first choice for the device."""
    needs_gradient = q.requires_grad and torch.is_grad_enabled()
    if backend != "auto":
        if backend not in BACKENDS:
            raise UserError(f"attention backend '{backend}' is unknown{did_you_mean(backend, ['auto', *BACKENDS])}")
        reason = reason_not(backend, mask, q.device, q.dtype, needs_gradient=needs_gradient)
        if reason:
            raise UserError(f"model.attention {backend} cannot run: {reason}; set it to auto")
        return backend
    if q.device.type != "cuda":
        return "sdpa"
    reasons = []
    for candidate in ("xformers", "flex"):
        reason = reason_not(candidate, mask, q.device, q.dtype, needs_gradient=needs_gradient)
        if not reason:
            break
        reasons.append(reason)
    else:
        candidate = "sdpa"
    if reasons:
        _announce(f"attention falls back to {candidate}: {'; '.join(reasons)}")
    return candidate


@functools.cache
def _announce(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def backend_report(device: torch.device | str, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Backend -> why causal attention cannot train with it on this device (empty: it can)."""
    return {name: reason_not(name, Causal(), device, dtype, needs_gradient=True) for name in BACKENDS}


def _clean_noisy(q: Query, k: KeyValue, v: KeyValue, mask: CleanNoisy, backend: str) -> Query:
    length = mask.length
    if not q.shape[1] == k.shape[1] == 2 * length:
        raise UserError(f"CleanNoisy(length={length}) needs {2 * length} rows, clean then noisy; got {q.shape[1]}")
    clean = attention(q[:, :length], k[:, :length], v[:, :length], Causal(), backend=backend)
    noisy = context_attention(q[:, length:], k[:, :length], v[:, :length], k[:, length:], v[:, length:],
                              strict=mask.strict, backend=backend)
    return torch.cat([clean, noisy], dim=1)


def context_attention(q: Query, k: KeyValue, v: KeyValue, k_own: KeyValue, v_own: KeyValue, *, strict: bool = False,
                      backend: str = "auto") -> Query:
    """Row i attends to context rows up to i (`strict`: before i) and to its own key and value, in one softmax.

    Exact, with the memory of plain causal attention: no L x 2L tensor. Fewer queries than context rows are the last
    rows (decoding). `backend` names what runs the context's part, with the same errors as `attention`.
    """
    resolve_backend(backend, Causal(), q)
    if q.shape[1] != k.shape[1] or not has_causal_kernel(q):
        return _context_dense(q, k, v, k_own, v_own, strict)
    return _ContextAttention.apply(q, k, v, k_own, v_own, strict)


def _context_dense(q, k, v, k_own, v_own, strict) -> Query:
    """The formula itself: for a few new rows against a cache, and for devices without a causal kernel."""
    num_heads, (num_queries, num_keys) = q.shape[2], (q.shape[1], k.shape[1])
    k, v, k_own, v_own = (expand_heads(t, num_heads) for t in (k, v, k_own, v_own))
    scale = 1 / math.sqrt(q.shape[-1])
    places = torch.arange(num_keys - num_queries, num_keys, device=q.device).unsqueeze(1) - int(strict)
    hidden = torch.arange(num_keys, device=q.device) > places  # L M
    scores = torch.einsum("blhd,bmhd->bhlm", q, k).mul(scale).masked_fill(hidden, -math.inf)
    own = (q * k_own).sum(-1).mul(scale).transpose(1, 2).unsqueeze(-1)  # B H L 1
    probs = torch.softmax(torch.cat([scores, own], dim=-1).float().to(torch.promote_types(q.dtype, torch.float32)), -1)
    probs = probs.to(q.dtype)
    mixed = torch.einsum("bhlm,bmhd->blhd", probs[..., :-1], v)
    return mixed + probs[..., -1:].transpose(1, 2) * v_own


class _ContextAttention(torch.autograd.Function):
    """Causal attention by the fused kernel, the own key merged in by log-sum-exp.

    In backward the kernel is given the MERGED output and log-sum-exp: its probabilities exp(s - lse) and its
    delta = sum(grad * out) are then those of the joint softmax, so dq, dk, dv of the context are exact as they are.
    """

    @staticmethod
    def forward(ctx, q, k, v, k_own, v_own, strict):
        first = int(strict)  # strict: row 0 sees only itself, row i >= 1 sees context rows up to i - 1
        lse_own = _own_scores(q, k_own)  # B L H
        if q.shape[1] > first:
            context, lse = causal_forward(*_aligned(q, k, v, first))
            lse = torch.logaddexp(lse.transpose(1, 2).to(lse_own.dtype), lse_own[:, first:])
            share = torch.exp(lse_own[:, first:] - lse).unsqueeze(-1).to(q.dtype)
            out = torch.lerp(context, expand_heads(v_own, q.shape[2])[:, first:], share)
        else:
            out, lse = q[:, :0], lse_own[:, :0]
        if strict:
            out = torch.cat([expand_heads(v_own, q.shape[2])[:, :1], out], dim=1)
            lse = torch.cat([lse_own[:, :1], lse], dim=1)
        ctx.save_for_backward(q, k, v, k_own, v_own, out, lse)
        ctx.first = first
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, k_own, v_own, out, lse = ctx.saved_tensors
        first, heads, kv_heads = ctx.first, q.shape[2], k.shape[2]
        wide = lse.dtype
        k_own_wide, v_own_wide = (expand_heads(t, heads).to(wide) for t in (k_own, v_own))
        p_own = torch.exp(_own_scores(q, k_own) - lse).unsqueeze(-1)  # B L H 1
        delta = grad.to(wide) * (v_own_wide - out.to(wide))
        d_score = p_own * delta.sum(-1, keepdim=True) / math.sqrt(q.shape[-1])
        dq = d_score * k_own_wide
        dk_own, dv_own = _sum_heads(d_score * q.to(wide), kv_heads), _sum_heads(p_own * grad.to(wide), kv_heads)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        if q.shape[1] > first:
            rows = slice(first, None)
            lse_rows = lse[:, rows].transpose(1, 2).contiguous()
            lse_rows = lse_rows if q.dtype == torch.float64 else lse_rows.float()
            dq_c, dk_c, dv_c = causal_backward(grad[:, rows].contiguous(), *_aligned(q, k, v, first),
                                               out[:, rows].contiguous(), lse_rows)
            dq[:, rows] += dq_c
            last = k.shape[1] - first
            dk[:, :last], dv[:, :last] = _sum_heads(dk_c, kv_heads), _sum_heads(dv_c, kv_heads)
        return dq.to(q.dtype), dk, dv, dk_own.to(k.dtype), dv_own.to(v.dtype), None


def _aligned(q: Tensor, k: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and context rows such that plain causal attention is what row i may see, all with the query's heads."""
    heads, last = q.shape[2], k.shape[1] - first
    return q[:, first:], expand_heads(k[:, :last], heads), expand_heads(v[:, :last], heads)


def _own_scores(q: Tensor, k_own: Tensor) -> Float[Tensor, "batch length heads"]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return (q.to(wide) * expand_heads(k_own, q.shape[2]).to(wide)).sum(-1) / math.sqrt(q.shape[-1])


def _sum_heads(x: Tensor, kv_heads: int) -> Tensor:
    """Add up the gradients of the query heads that share a key or value head."""
    return x if x.shape[2] == kv_heads else x.unflatten(2, (kv_heads, -1)).sum(3)  # B L (G n) K -> B L G K
