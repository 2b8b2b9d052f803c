"""Attention backends (SDPA, flex, xformers): what each can run, and its call. Only this file knows flex; xformers is
also known to causal_kernels.py and xformers_build.py.

xformers and flex are imported on first use. A `reason` is an empty string if the backend can run. xformers' own
dispatch decides what it can run, and torch's own check what flash and cuDNN can, from small probes. Shortcuts test a
mask's exact class, since a subclass may allow other pairs.
"""

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from looped.devices import pinned, to_device
from looped.nn.bands import Part, parts_of, run_parts
from looped.nn.masks import Causal, CleanNoisy, Full, Mask, Packed, Padded
from looped.nn.wide_attention import HALF
from looped.nn.xformers_build import load_fmha, unloaded

BACKENDS = ("xformers", "flash", "cudnn", "sdpa", "flex")
HALF_AND_SINGLE = (*HALF, torch.float32)


def reason_not(backend: str, mask: Mask, device: torch.device | str, dtype: torch.dtype, *, head_dim: int = 64,
               needs_gradient: bool = False) -> str:
    """The reason `backend` cannot run this, or an empty string."""
    return REASONS[backend](mask, torch.device(device), dtype, head_dim, needs_gradient)


def expand_heads(x: Tensor, num_heads: int) -> Tensor:
    """Repeat each of G key or value heads for its H / G query heads: a copy, unless G = H."""
    if x.shape[2] == num_heads:
        return x
    repeats = num_heads // x.shape[2]
    return x.unsqueeze(3).expand(-1, -1, -1, repeats, -1).flatten(2, 3)  # B L G K -> B L (G n) K


def sum_heads(x: Tensor, kv_heads: int) -> Tensor:
    """Add up the gradients of the query heads that share a key or value head: the reverse of `expand_heads`."""
    return x if x.shape[2] == kv_heads else x.unflatten(2, (kv_heads, -1)).sum(3)  # B L (G n) K -> B L G K


# ----------------------------------------------------------------------------- SDPA


def _sdpa_reason(mask, device, dtype, head_dim, needs_gradient) -> str:
    return ""


def needs_tensor(mask: Mask) -> bool:
    """True if SDPA has no flag for the mask and takes it as a tensor of queries x keys."""
    return type(mask) not in (Full, Causal, CleanNoisy)


def run_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention by SDPA. Reads grouped heads and the (B, L, H, K) layout in place; the output has that layout."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    rows = [t.transpose(1, 2) for t in (q, k, v)]  # B H L K, as views
    options: dict = {"enable_gqa": q.shape[2] != k.shape[2]}
    if type(mask) is Full or (type(mask) is Causal and num_queries == 1):
        return F.scaled_dot_product_attention(*rows, **options).transpose(1, 2)
    if type(mask) is Causal and num_queries == num_keys:
        return F.scaled_dot_product_attention(*rows, is_causal=True, **options).transpose(1, 2)
    form = mask.form(("sdpa", q.shape[0], num_queries, num_keys, q.device),
                     lambda: _sdpa_form(mask, num_queries, num_keys, q))
    if form.parts:
        out = run_parts(*rows, form.allowed, form.parts)
    else:
        out = F.scaled_dot_product_attention(*rows, attn_mask=form.allowed, **options)
    if form.empty is not None:
        out = out.masked_fill(form.empty, 0)
    return out.transpose(1, 2)


class Allowed(NamedTuple):
    """SDPA's form of a mask: the allowed pairs; the rows that may attend to no key, or None if there are none; parts to
    compute, or none for the whole.

    Kernels differ on rows without keys: NaN, zero, or the mean of v. So they attend to every key here, and their output
    is set to zero; on a device always, since the host would wait to learn whether there are any.
    """

    allowed: Tensor
    empty: Tensor | None
    parts: Sequence[Part]


def _sdpa_form(mask: Mask, num_queries: int, num_keys: int, q: Tensor) -> Allowed:
    allowed = mask.dense(q.shape[0], num_queries, num_keys, q.device)
    empty, parts = ~allowed.any(-1, keepdim=True), parts_of(allowed)
    if q.device.type == "cpu" and not bool(empty.any()):
        return Allowed(allowed, None, parts)
    return Allowed(allowed | empty, empty, parts)


# ----------------------------------------------------------------------------- SDPA with one kernel first

FIRST = {"flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION,
                   SDPBackend.MATH],
         "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                   SDPBackend.MATH]}
"""SDPA's kernels in order of preference. The others follow the chosen one, since no kernel takes every call of a model:
flash takes no mask tensor, which decoding with a cache needs."""


def _first_reason(backend: str, mask, device, dtype, head_dim, needs_gradient) -> str:
    if device.type != "cuda":
        return f"{backend} attention runs on cuda, not on {device.type}"
    if dtype not in HALF:
        return f"{backend} attention takes float16 and bfloat16, not {_name(dtype)}"
    return sdpa_declines(backend, device, dtype, head_dim, needs_gradient)


@functools.cache
def sdpa_declines(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, needs_gradient: bool) -> str:
    """Reason that SDPA rejects a kernel for causal attention on this device; empty if it accepts."""
    takes = {"flash": torch.backends.cuda.can_use_flash_attention, "cudnn": torch.backends.cuda.can_use_cudnn_attention}
    probe = torch.empty(1, 2, 64, head_dim, device=device, dtype=dtype, requires_grad=needs_gradient)
    inputs = torch.backends.cuda.SDPAParams(probe, probe, probe, None, 0.0, True, False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if takes[backend](inputs, debug=True):
            return ""
    why = "; ".join(" ".join(str(each.message).partition(" (Triggered")[0].split()) for each in said)
    return f"torch's check of {backend} attention declines head dim {head_dim} in {_name(dtype)} on this device" + (
        f": {why}" if why else "")


def run_flash(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """SDPA with FlashAttention first."""
    with sdpa_kernel(FIRST["flash"], set_priority=True):
        return run_sdpa(q, k, v, mask)


def run_cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """SDPA with cuDNN's attention first."""
    with sdpa_kernel(FIRST["cudnn"], set_priority=True):
        return run_sdpa(q, k, v, mask)


# ----------------------------------------------------------------------------- flex


def _flex_reason(mask, device, dtype, head_dim, needs_gradient) -> str:
    if type(mask) is CleanNoisy:
        return "CleanNoisy runs in its split form, which flex does not offer"
    if device.type != "cuda":
        return f"flex attention has no backward pass on {device.type}" if needs_gradient else ""
    if dtype not in HALF_AND_SINGLE:
        return f"flex attention takes float16, bfloat16 and float32 on cuda, not {_name(dtype)}"
    return "" if importlib.util.find_spec("triton") else "flex attention needs triton on cuda; pip install triton"


def flex_block_mask(mask: Mask, batch: int, num_queries: int, num_keys: int, device: torch.device) -> Any:
    """The `BlockMask` of flex attention, built from a closure since flex rejects bound methods.

    The closure holds a copy of the mask with its tensors on `device`: the compiled kernel evaluates it there, and since
    the mask caches this form, a closure over the mask itself would be a reference cycle.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    mask.check(batch, num_queries, num_keys)
    offset = num_keys - num_queries
    plain = mask.on(device)
    rows = batch if mask.differs(device) else None
    return create_block_mask(lambda b, h, q, k: plain.allow(q + offset, k, b), rows, None, num_queries, num_keys,
                             device=device)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def run_flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention by flex: compiled on CUDA; elsewhere the unfused formula, for checking."""
    from torch.nn.attention.flex_attention import flex_attention

    sizes = q.shape[0], q.shape[1], k.shape[1], q.device
    block_mask = mask.form(("flex", *sizes), lambda: flex_block_mask(mask, *sizes))
    run = _compiled_flex() if q.is_cuda else flex_attention
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))  # B L H K -> B H L K
    return run(q, k, v, block_mask=block_mask, enable_gqa=grouped).transpose(1, 2)


# ----------------------------------------------------------------------------- xformers


@functools.cache
def _loaded() -> tuple[Any, str]:
    """(`xformers.ops.fmha` or None, why not), tried once."""
    return load_fmha()


def xformers_ops() -> Any:
    """The module `xformers.ops.fmha`, or None if it cannot be imported."""
    return _loaded()[0]


def xformers_absent() -> str:
    """Reason that xformers is unusable: it is not installed, its import fails, or its library does not load. Empty if
    it works."""
    fmha, reason = _loaded()
    return reason or unloaded(fmha)


def _xformers_reason(mask, device, dtype, head_dim, needs_gradient) -> str:
    if device.type != "cuda":
        return f"xformers' attention runs on cuda, not on {device.type}"
    if dtype not in HALF_AND_SINGLE:
        return f"xformers' attention takes float16, bfloat16 and float32, not {_name(dtype)}"
    if type(mask) not in (Full, Causal, Packed, Padded, CleanNoisy):
        return f"xformers has no bias class for {type(mask).__name__}"
    deterministic = torch.are_deterministic_algorithms_enabled()
    return xformers_absent() or xformers_operators(
        type(mask), device, dtype, head_dim, needs_gradient, deterministic)[1]


@functools.cache
def xformers_operators(kind: type[Mask], device: torch.device, dtype: torch.dtype, head_dim: int,
                       needs_gradient: bool, deterministic: bool = False) -> tuple[tuple[str, ...], str]:
    """(operators that xformers would dispatch for forward and, with gradient, backward; the reason if none).
    deterministic: torch's own setting, by which the dispatch leaves operators out; here for the cache."""
    fmha = xformers_ops()
    bias = None if kind is Full else fmha.LowerTriangularMask()
    if kind in (Packed, Padded):
        bias = _block_diagonal(True, [4, 4], [4, 4], torch.device("cpu"))
    probe = torch.empty(1, 8, 2, head_dim, device=device, dtype=dtype)
    inputs = fmha.Inputs(query=probe, key=probe, value=probe, attn_bias=bias)
    try:
        operators = [fmha._dispatch_fw(inputs, needs_gradient)]
        if needs_gradient:
            operators.append(fmha._dispatch_bw(inputs, operators[0].VARLEN_LSE_PACKED))
    except NotImplementedError as error:
        _, *declined = str(error).split("\n`")  # one entry per operator, its reasons on the lines below
        return (), "; ".join("`" + " ".join(entry.split()) for entry in declined)
    return tuple(operator.NAME for operator in operators), ""


@dataclass(frozen=True)
class Blocks:
    """Runs of rows that attend to each other, concatenated into one sequence: xformers' form of packing and padding.

    The indices select those rows from the flattened batch; None selects all of them.
    """

    bias: Any
    q_index: Tensor | None
    k_index: Tensor | None


def xformers_blocks(mask: Packed | Padded, batch: int, num_queries: int, num_keys: int,
                    device: torch.device) -> Blocks:
    """Each run of rows with queries as a block; runs without queries are left out."""
    mask.check(batch, num_queries, num_keys)
    offset, q_rows, k_rows = num_keys - num_queries, [], []
    for b, spans in enumerate(mask.spans(num_keys) * (batch // mask.batch)):
        for start, stop in spans:
            if stop > max(start, offset):
                q_rows.append(range(b * num_queries + max(start - offset, 0), b * num_queries + stop - offset))
                k_rows.append(range(b * num_keys + start, b * num_keys + stop))
    lengths = [len(rows) for rows in q_rows], [len(rows) for rows in k_rows]
    return Blocks(_block_diagonal(mask.causal, *lengths, device),
                  _index(q_rows, batch * num_queries, device), _index(k_rows, batch * num_keys, device))


def _block_diagonal(causal: bool, q_lengths: list[int], k_lengths: list[int], device):
    """The block-diagonal bias; None if there are no blocks, since every row is padding."""
    fmha = xformers_ops()
    if not q_lengths:
        return None
    if not causal:
        return fmha.attn_bias.BlockDiagonalMask.from_seqlens(q_lengths, k_lengths, device=device)
    if q_lengths == k_lengths:
        return fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(q_lengths, device=device)
    return fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(q_lengths, k_lengths, device=device)


def _index(rows: list[range], total: int, device) -> Tensor | None:
    if sum(map(len, rows)) == total:
        return None
    runs = [torch.arange(run.start, run.stop) for run in rows]
    return to_device(pinned(torch.cat(runs or [torch.arange(0)]), device), device)


def xformers_bias(mask: Full | Causal, num_queries: int, num_keys: int) -> Any:
    """The `AttentionBias` equivalent to `mask`; None for full attention."""
    fmha = xformers_ops()
    if type(mask) is Full:
        return None
    assert type(mask) is Causal, mask
    if num_queries == num_keys:
        return fmha.LowerTriangularMask()
    return fmha.attn_bias.LowerTriangularFromBottomRightMask()


def run_xformers(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention by xformers. Without gradient it reads grouped heads in place; its backward cannot, so training
    repeats them."""
    sizes = q.shape[1], k.shape[1]
    if type(mask) not in (Packed, Padded):
        return _xformers(q, k, v, mask.form(("xformers", *sizes), lambda: xformers_bias(mask, *sizes)))
    sizes = q.shape[0], *sizes, q.device
    blocks = mask.form(("xformers", *sizes), lambda: xformers_blocks(mask, *sizes))
    flat = [t.flatten(0, 1) for t in (q, k, v)]  # B L H K -> (B L) H K
    if blocks.bias is None:
        return q * 0
    packed = [t if index is None else t.index_select(0, index)
              for t, index in zip(flat, (blocks.q_index, blocks.k_index, blocks.k_index), strict=True)]
    out = _xformers(*(t.unsqueeze(0) for t in packed), blocks.bias).squeeze(0)
    if blocks.q_index is not None:
        out = torch.zeros_like(flat[0]).index_copy(0, blocks.q_index, out)
    return out.view(q.shape)


def _xformers(q: Tensor, k: Tensor, v: Tensor, bias) -> Tensor:
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads != kv_heads and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        k, v = expand_heads(k, heads), expand_heads(v, heads)
    elif heads != kv_heads:
        shape = (*k.shape[:3], heads // kv_heads, k.shape[-1])
        k, v = (t.unsqueeze(3).expand(shape) for t in (k, v))  # B L G K -> B L G n K, stride 0 along n
        return xformers_ops().memory_efficient_attention(q.unflatten(2, shape[2:4]), k, v, attn_bias=bias).flatten(2, 3)
    return xformers_ops().memory_efficient_attention(q, k, v, attn_bias=bias)


REASONS = {"xformers": _xformers_reason, "flash": functools.partial(_first_reason, "flash"),
           "cudnn": functools.partial(_first_reason, "cudnn"), "sdpa": _sdpa_reason, "flex": _flex_reason}
RUN = {"xformers": run_xformers, "flash": run_flash, "cudnn": run_cudnn, "sdpa": run_sdpa, "flex": run_flex}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
