"""Attention for every mask and backend, and attention of each row to a clean context plus its own key.

Layout (batch, length, heads, head dim), as in xformers. Keys and values may have fewer heads than queries.
"""

import functools
import math
import warnings

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from looped.errors import UserError, did_you_mean
from looped.nn.backends import (
    BACKENDS,
    RUN,
    expand_heads,
    needs_tensor,
    reason_not,
    sum_heads,
    xformers_absent,
)
from looped.nn.causal_kernels import causal_kernel
from looped.nn.mask_base import Mask, as_mask
from looped.nn.masks import Causal, CleanNoisy
from looped.nn.wide_attention import by_kernels
from looped.tensor_types import Bool, Float

Query = Float[Tensor, "batch queries heads dim"]
KeyValue = Float[Tensor, "batch keys kv_heads dim"]
Own = Float[Tensor, "batch queries kv_heads dim"]


def attention(q: Query, k: KeyValue, v: KeyValue, mask: Mask | Bool[Tensor, "*batch queries keys"], *,
              backend: str = "auto") -> Query:
    """softmax(q k / sqrt(K)) v over the keys that `mask` allows; zero for rows that may attend to no key.

    mask: a mask object, or a bool tensor, true if a query attends to a key (`Table`). If there are fewer queries than
    keys (a cache), the queries are the last rows. `auto`: xformers on CUDA, flex for CUDA masks that xformers has no
    class for, SDPA elsewhere; `flash`, `cudnn`: SDPA with that kernel first. Raises `UserError` for a named backend
    that cannot run, with the reason, and for sizes that do not fit the mask; warns if the layout looks like torch's
    (batch, heads, length, dim).
    """
    mask = as_mask(mask)
    q, k, v = _autocast(q, k, v)
    _check_heads(q, k, v)
    _notice_layout(q)
    mask.check(q.shape[0], q.shape[1], k.shape[1])
    if type(mask) is CleanNoisy:
        return _clean_noisy(q, k, v, mask, backend)
    return by_kernels(lambda q, k, v: RUN[resolve_backend(backend, mask, q, k, v)](q, k, v, mask), k.shape[1], q, k, v)


def context_attention(q: Query, k_context: KeyValue, v_context: KeyValue, k_own: Own, v_own: Own, *,
                      strict: bool = False, backend: str = "auto") -> Query:
    """Row i attends to context rows up to i (`strict`: before i) and to its own key and value, in one softmax.

    Exact, with the memory of plain causal attention: no L x 2L tensor, and for backward only the inputs, the output
    and its log-sum-exp are saved. If there are fewer queries than context rows (decoding), the queries are the last
    rows, and the dense formula runs (queries x keys). `backend` runs the part over the context, with the same errors
    as `attention`.
    """
    q, k, v, k_own, v_own = _autocast(q, k_context, v_context, k_own, v_own)
    _check_heads(q, k, v)
    _check_heads(q, k_own, v_own)
    _check_rows(q, k, k_own)
    return by_kernels(lambda *rows: _to_context(*rows, strict, backend), k.shape[1], q, k, v, k_own, v_own)


def _to_context(q: Tensor, k: Tensor, v: Tensor, k_own: Tensor, v_own: Tensor, strict: bool, backend: str) -> Tensor:
    name = resolve_backend(backend, CleanNoisy(k.shape[1], strict), q, k, v)
    if q.shape[1] != k.shape[1]:
        return _context_formula(q, k, v, k_own, v_own, strict)
    if causal_kernel(name, q.device, q.dtype, q.shape[-1]) is None:
        _announce(f"attention to a context falls back to the plain formula, length x length in memory: {name} has no "
                  f"causal kernel with a log-sum-exp for {q.dtype} and head dim {q.shape[-1]} on {q.device.type}")
        return _context_formula(q, k, v, k_own, v_own, strict)
    return _ContextAttention.apply(q, k, v, k_own, v_own, (int(strict), name))


def available_backends(device: torch.device | str, dtype: torch.dtype = torch.float32,
                       mask: Mask | None = None) -> dict[str, str]:
    """Map from backend to the reason it cannot train with `mask` (causal if None) on this device; empty if it can."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return dict.fromkeys(BACKENDS, "this torch sees no CUDA device")
    return {name: reason_not(name, mask or Causal(), device, dtype, needs_gradient=True) for name in BACKENDS}


def resolve_backend(backend: str, mask: Mask, q: Tensor, *others: Tensor) -> str:
    """The backend that will run; warns once if it is not the first choice for the device.

    Inside `torch.compile` nothing is asked, since a graph cannot hold xformers or its dispatch: a named backend is
    taken as it is, and `auto` is what was resolved for such a mask before, or SDPA.
    """
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, *others))
    if backend == "auto" and q.device.type != "cuda":
        return "sdpa"
    if torch.compiler.is_compiling():
        return _inside_graph(type(mask), q.dtype) if backend == "auto" else backend
    name = choose_backend(backend, mask, q.device, q.dtype, head_dim=q.shape[-1], needs_gradient=needs_gradient)
    _resolved[type(mask), q.dtype] = name
    return name


_resolved: dict[tuple[type[Mask], torch.dtype], str] = {}
"""The last result of `resolve_backend`, by the class of the mask and the dtype."""


def _inside_graph(kind: type[Mask], dtype: torch.dtype) -> str:
    """`auto` in a compiled graph. xformers' kernels cannot be traced; for causal masks SDPA has the same one
    (FlashAttention-2)."""
    name = _resolved.get((kind, dtype), "sdpa")
    return "sdpa" if name == "xformers" else name


def choose_backend(backend: str, mask: Mask, device: torch.device | str, dtype: torch.dtype, *, head_dim: int = 64,
                   needs_gradient: bool = False) -> str:
    """The backend that will run a mask on a device, as `resolve_backend`. Raises `UserError` for a named backend that
    cannot, with the reason."""
    device = torch.device(device)
    if backend == "auto" and device.type != "cuda":
        return "sdpa"
    why = functools.partial(reason_not, mask=mask, device=device, dtype=dtype, head_dim=head_dim,
                            needs_gradient=needs_gradient)
    return _first_that_runs(mask, why) if backend == "auto" else _forced(backend, why)


def _forced(backend: str, why) -> str:
    if backend not in BACKENDS:
        raise UserError(f"attention backend '{backend}' is unknown{did_you_mean(backend, ['auto', *BACKENDS])}")
    if reason := why(backend):
        raise UserError(f"attention backend '{backend}' cannot run: {reason}; use 'auto'")
    return backend


def _first_that_runs(mask: Mask, why) -> str:
    """The first backend that runs on CUDA. Flex precedes SDPA only if SDPA needs a queries x keys mask tensor."""
    reasons = {}
    for candidate in ("xformers", "flex", "sdpa") if needs_tensor(mask) else ("xformers", "sdpa"):
        if not (reason := why(candidate)):
            break
        reasons[candidate] = reason
    if "xformers" in reasons and reasons["xformers"] == xformers_absent():  # the same for all masks, so said once
        _announce(f"attention runs without xformers, by SDPA if causal and by flex under other masks: "
                  f"{reasons.pop('xformers')}")
    if reasons:
        _announce(f"attention falls back from {next(iter(reasons))} to {candidate}: {'; '.join(reasons.values())}")
    return candidate


def _announce(message: str) -> None:
    """Warn once per message, and not while a graph is traced."""
    if not torch.compiler.is_compiling():
        _warn_once(message)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """Cast to autocast's dtype if it is on: kernels called directly are not on torch's own autocast list."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    return [t.to(torch.get_autocast_dtype(device)) for t in tensors]


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.shape != v.shape or (k.shape[0], k.shape[-1]) != (q.shape[0], q.shape[-1]):
        raise UserError(f"attention needs q (batch, queries, heads, dim) and k, v (batch, keys, kv heads, dim); "
                        f"got {shapes}")
    if not q.is_floating_point() or not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        kinds = ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')} on {t.device}" for name, t in
                          (("q", q), ("k", k), ("v", v)))
        raise UserError(f"attention needs q, k and v of one floating dtype on one device; got {kinds}")
    if q.shape[2] % k.shape[2]:
        raise UserError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads; "
                        f"the number of query heads must be a multiple of the number of key heads")


MANY_HEADS = 32


def _notice_layout(q: Tensor) -> None:
    """Warn if few rows have many heads: probably torch's layout, in which heads come before length."""
    rows, heads = q.shape[1:3]
    if heads > MANY_HEADS and 1 < rows < heads:
        _announce(f"attention reads q of shape {tuple(q.shape)} as {rows} rows of {heads} heads, since the layout is "
                  f"(batch, length, heads, dim); convert torch's (batch, heads, length, dim) by .transpose(1, 2)")


def _check_rows(q: Tensor, k: Tensor, k_own: Tensor) -> None:
    if k_own.shape[1] != q.shape[1] or q.shape[1] > k.shape[1]:
        raise UserError(f"context_attention needs one own key for each query and no more queries than context rows; "
                        f"got {q.shape[1]} queries, {k_own.shape[1]} own keys, {k.shape[1]} context rows")


def _clean_noisy(q: Query, k: KeyValue, v: KeyValue, mask: CleanNoisy, backend: str) -> Query:
    """Split form: causal attention for the clean half; a noisy row attends to the clean half and to itself."""
    length = mask.length
    if q.shape[1] != 2 * length:
        raise UserError(f"CleanNoisy(length={length}) needs {2 * length} queries, clean then noisy; got {q.shape[1]}")
    clean = attention(q[:, :length], k[:, :length], v[:, :length], Causal(), backend=backend)
    noisy = context_attention(q[:, length:], k[:, :length], v[:, :length], k[:, length:], v[:, length:],
                              strict=mask.strict, backend=backend)
    return torch.cat([clean, noisy], dim=1)


def _context_formula(q: Tensor, k: Tensor, v: Tensor, k_own: Tensor, v_own: Tensor, strict: bool) -> Tensor:
    """Dense softmax over [context; own], for a few new rows or if there is no causal kernel."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    k, v, k_own, v_own = (expand_heads(t, q.shape[2]) for t in (k, v, k_own, v_own))
    places = torch.arange(num_keys - num_queries, num_keys, device=q.device).unsqueeze(1) - int(strict)
    hidden = torch.arange(num_keys, device=q.device) > places  # L M
    scores = torch.einsum("blhd,bmhd->bhlm", q, k).to(_wide(q)) / math.sqrt(q.shape[-1])
    own = _own_scores(q, k_own).transpose(1, 2).unsqueeze(-1)  # B H L 1
    probs = torch.softmax(torch.cat([scores.masked_fill(hidden, -math.inf), own], dim=-1), -1).to(q.dtype)
    mixed = torch.einsum("bhlm,bmhd->blhd", probs[..., :-1], v)
    return mixed + probs[..., -1:].transpose(1, 2) * v_own  # B L H K


class _ContextAttention(torch.autograd.Function):
    """Causal attention by the fused kernel, with each row's own key merged in by log-sum-exp.

    In backward the kernel gets the MERGED output and log-sum-exp: its probabilities exp(s - lse) and its
    delta = sum(grad * out) are then those of the joint softmax, so its dq, dk, dv of the context are exact.
    Strict: row 0 attends only to itself, and rows from 1 on are causal over the context without its last row.
    """

    @staticmethod
    def forward(ctx, q, k, v, k_own, v_own, way):
        (first, backend), v_heads = way, expand_heads(v_own, q.shape[2])
        lse_own = _own_scores(q, k_own)  # B L H
        out, lse = q[:, :0], lse_own[:, :0]
        if q.shape[1] > first:
            kernel = causal_kernel(backend, q.device, q.dtype, q.shape[-1])
            context, lse = kernel.forward(*_shifted(q, k, v, first))
            lse = torch.logaddexp(lse.transpose(1, 2), lse_own[:, first:])
            share = torch.exp(lse_own[:, first:] - lse).unsqueeze(-1).to(q.dtype)  # B L H 1
            out = torch.lerp(context, v_heads[:, first:], share)
        if first:
            out, lse = torch.cat([v_heads[:, :1], out], dim=1), torch.cat([lse_own[:, :1], lse], dim=1)
        ctx.save_for_backward(q, k, v, k_own, v_own, out, lse)
        ctx.first, ctx.backend = first, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, k_own, v_own, out, lse = ctx.saved_tensors
        dq, dk_own, dv_own = _own_gradients(grad, q, k_own, v_own, out, lse)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        first, last = ctx.first, k.shape[1] - ctx.first
        if last:
            kernel = causal_kernel(ctx.backend, q.device, q.dtype, q.shape[-1])
            lse = lse[:, first:].transpose(1, 2).contiguous()  # B L H -> B H L
            dq_context, dk[:, :last], dv[:, :last] = kernel.backward(
                grad[:, first:].contiguous(), *_shifted(q, k, v, first), out[:, first:].contiguous(), lse)
            dq[:, first:] += dq_context
        return dq.to(q.dtype), dk, dv, dk_own, dv_own, None


def _shifted(q: Tensor, k: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values sliced so that plain causal attention is the pattern over the context."""
    last = k.shape[1] - first
    return q[:, first:], k[:, :last], v[:, :last]


def _own_gradients(grad, q, k_own, v_own, out, lse) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk_own, dv_own) through each row's score with its own key; dq in float32 or wider, for accumulation."""
    wide, kv_heads = lse.dtype, k_own.shape[2]
    k_wide, v_wide = (expand_heads(t, q.shape[2]).to(wide) for t in (k_own, v_own))
    probability = torch.exp(_own_scores(q, k_own) - lse).unsqueeze(-1)  # B L H 1
    delta = (grad.to(wide) * (v_wide - out.to(wide))).sum(-1, keepdim=True)
    d_score = probability * delta / math.sqrt(q.shape[-1])
    dk_own, dv_own = sum_heads(d_score * q.to(wide), kv_heads), sum_heads(probability * grad.to(wide), kv_heads)
    return d_score * k_wide, dk_own.to(k_own.dtype), dv_own.to(v_own.dtype)


def _own_scores(q: Tensor, k_own: Tensor) -> Float[Tensor, "batch length heads"]:
    return (q.to(_wide(q)) * expand_heads(k_own, q.shape[2]).to(_wide(q))).sum(-1) / math.sqrt(q.shape[-1])


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of scores and log-sum-exps: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
