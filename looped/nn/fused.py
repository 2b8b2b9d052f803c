"""RMSNorm, projections and cross-entropy that save less memory for backward than their plain forms.

Under BPTT every saved tensor is paid once per loop step. `rms_norm` saves its input and one number per row, and adds
nothing for the AdaLN modulation. `project` saves the input of its activation and recomputes the activation, and
differentiates a per-sequence output gate without saving the ungated output. `linear_cross_entropy` never holds the
logits of more than a few rows. Values and gradients are those of the plain formulas.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from looped.fused_on_cuda import is_recent_cuda, on_device
from looped.nn.cast_once import cast
from looped.tensor_types import Float, Int

Activation = Literal["swiglu", "gelu"]
"""swiglu: `silu(a) * b` for x = [a; b] (Shazeer 2020). gelu: with the exact normal distribution (Hendrycks 2016)."""

HALF = {torch.float16, torch.bfloat16}

made_again: Callable[[], AbstractContextManager[None]] = nullcontext
"""Context entered around products that backward recomputes, so that a FLOP counter can exclude them."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products of `x` run in: autocast's if it is on, else the dtype of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def rms_norm(x: Float[Tensor, "*batch width"], weight: Float[Tensor, "width"], *, eps: float = 1e-6,
             scale: Tensor | None = None, shift: Tensor | None = None) -> Float[Tensor, "*batch width"]:
    """`x / rms(x) * weight * (1 + scale) + shift`; scale and shift broadcast against x (AdaLN), both or neither.

    Statistics in at least float32; the result has the dtype of the matrix product that follows.
    """
    return _RMSNorm.apply(x, weight, scale, shift, eps, compute_dtype(x))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale, shift, eps, dtype):
        dtype_wide = torch.promote_types(x.dtype, torch.float32)
        rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype_wide)
        rstd.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, rstd, weight, scale)
        out = (x * rstd).mul_(weight)
        if scale is not None:
            out = torch.addcmul(shift.to(out.dtype), out, 1 + scale.to(out.dtype))
        return out.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, rstd, weight, scale = ctx.saved_tensors
        grad = grad.to(rstd.dtype)
        normed = x * rstd
        product = grad * normed
        if scale is None:
            gain, grad_scale, grad_shift = weight, None, None
            grad_weight = product.sum_to_size(weight.shape).to(weight.dtype)
            along = (product @ weight.to(product.dtype)).unsqueeze(-1)
        else:
            factor = 1 + scale.to(rstd.dtype)
            gain, grad_shift = weight * factor, grad.sum_to_size(scale.shape).to(scale.dtype)
            by_scale = product.sum_to_size(scale.shape)
            grad_weight = (by_scale * factor).sum_to_size(weight.shape).to(weight.dtype)
            grad_scale = (by_scale * weight).to(scale.dtype)
            along = product.mul_(gain).sum(-1, keepdim=True)
        grad_x = torch.addcmul(grad * gain, normed, along, value=-1 / x.shape[-1]).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight, grad_scale, grad_shift, None, None


def project(x: Float[Tensor, "batch length inner"], weight: Float[Tensor, "width hidden"], *,
            gate: Tensor | None = None, activation: Activation | None = None) -> Float[Tensor, "batch length width"]:
    """`gate * (h @ weight.T)` with `h = x` or the `activation` of x.

    A gate of shape (batch, 1, width) saves no extra activation; any other that broadcasts to (batch, length, width)
    saves the output.
    """
    if gate is not None and gate.shape != (len(x), 1, len(weight)):
        return project(x, weight, activation=activation) * gate
    if gate is None and activation is None:
        return F.linear(x, weight)
    return _Project.apply(x, weight, gate, activation, compute_dtype(x))


def activated(x: Tensor, activation: Activation | None) -> Tensor:
    """The activation of x, or x itself."""
    if activation == "swiglu":
        a, b = x.chunk(2, -1)
        return F.silu(a) * b
    return F.gelu(x) if activation == "gelu" else x


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, gate, activation, dtype):
        # The float32 weight is saved and cast again in backward, once per step (`casts_kept`): a cast copy of each loop
        # step would be one more saved tensor.
        ctx.save_for_backward(x, weight, gate)
        ctx.activation, ctx.dtype = activation, dtype
        out = F.linear(_hidden(x, activation, dtype), cast(weight, dtype))
        return out if gate is None else out * gate.to(out.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, gate = ctx.saved_tensors
        dtype = ctx.dtype
        grad, narrow, grad_gate = grad.to(dtype), cast(weight, dtype), None
        gated = grad if gate is None else grad * gate.to(dtype)
        grad_x, hidden = gated @ narrow, x.to(dtype)
        if ctx.activation:
            hidden, grad_x = _activation_backward(x, grad_x, ctx.activation)
        hidden = hidden.to(dtype)
        if gate is not None and _is_long(grad):
            grad_weight, grad_gate = _gradients_by_sequence(grad, hidden, weight, gate)
        else:
            grad_weight = gated.flatten(0, -2).T @ hidden.flatten(0, -2)
            if gate is not None:
                with made_again():
                    ungated = hidden @ narrow.T
                grad_gate = ungated.mul_(grad).sum(-2, keepdim=True).to(gate.dtype)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_gate, None, None


def _hidden(x: Tensor, activation: Activation | None, dtype: torch.dtype) -> Tensor:
    if activation == "swiglu":
        a, b = x.chunk(2, -1)
        return F.silu(a).mul_(b).to(dtype)
    return (F.gelu(x) if activation == "gelu" else x).to(dtype)


def _activation_backward(x: Tensor, grad_hidden: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """(recomputed activation, gradient of x), a few rows at a time, so that they are read while in cache."""
    if torch.compiler.is_compiling():
        return _plain_activation_backward(x, grad_hidden.to(x.dtype), activation)
    all_x, all_d = x.flatten(0, -2), grad_hidden.flatten(0, -2)
    # Made as rows: to flatten a tensor with the strides of a transposed x copies it, and loses what is written there.
    hidden, grad = torch.empty_like(all_d, dtype=x.dtype), torch.empty_like(all_x)
    cached = x.untyped_storage().device.type == "cpu"  # a fake tensor has no bytes, and takes as long per piece
    length, ops = max(64, 2**16 // x.shape[-1]) if cached else x.numel(), torch.ops.aten
    rows = zip(*(t.split(length) for t in (all_x, all_d, hidden, grad)), strict=True)
    for x_part, d_hidden, hidden_part, grad_part in rows:
        if activation == "gelu":
            ops.gelu.out(x_part, out=hidden_part)
            ops.gelu_backward.grad_input(d_hidden.to(x.dtype), x_part, grad_input=grad_part)
            continue
        (a, b), (d_a, d_b) = x_part.chunk(2, -1), grad_part.chunk(2, -1)
        ops.silu.out(a, out=hidden_part)
        torch.mul(hidden_part, d_hidden, out=d_b)
        ops.silu_backward.grad_input(d_hidden * b, a, grad_input=d_a)
        hidden_part.mul_(b)
    return hidden.view(grad_hidden.shape), grad.view(x.shape)


def _plain_activation_backward(x: Tensor, grad_hidden: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """`_activation_backward` for torch.compile, which cannot write into half of a tensor, but fuses these itself."""
    ops = torch.ops.aten
    if activation == "gelu":
        return F.gelu(x), ops.gelu_backward(grad_hidden, x)
    a, b = x.chunk(2, -1)
    silu = F.silu(a)
    return silu * b, torch.cat([ops.silu_backward(grad_hidden * b, a), silu * grad_hidden], -1)


def _is_long(grad: Tensor) -> bool:
    """True if one more pass over the weight per sequence is faster than recomputing the ungated output: on a CPU from
    48 rows in float32 and 96 in bf16, whose products are faster; never on a GPU (one kernel launch per sequence)."""
    return grad.device.type == "cpu" and grad.shape[-2] * grad.element_size() >= 192


def _gradients_by_sequence(grad: Tensor, hidden: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and gate. A sequence's gate gradient is the inner product of its weight gradient (before the
    gate) with the weight, so the ungated output is not needed. One sequence at a time, so that one weight fits the
    cache."""
    grad_weight, grad_gate = torch.zeros_like(weight), torch.empty_like(gate)
    for d_out, h, g, d_gate in zip(grad, hidden, gate, grad_gate, strict=True):
        own = (d_out.mT @ h).to(weight.dtype)  # D F
        grad_weight.addcmul_(own, g.mT.to(own.dtype))
        d_gate[0] = torch.linalg.vecdot(own, weight)
    return grad_weight, grad_gate


def linear_cross_entropy(x: Float[Tensor, "batch length width"], weight: Float[Tensor, "vocab width"],
                         targets: Int[Tensor, "batch length"], *, scale: Float[Tensor, ""] | None = None,
                         evidence: tuple[Tensor, Tensor] | None = None) -> Float[Tensor, "batch length"]:
    """Cross-entropy of every row, in nats, with the logits `scale * (x @ weight.T)`, in float32 or wider.

    `evidence` (u, table) adds `u @ table.T` to the logits, a product of few terms that is never rounded to bf16. Saves
    x, u, table and one log-sum-exp per row; backward recomputes the logits, some rows at a time: one more product.
    What is done to a chunk of logits is compiled on CUDA (`on_device`). torch's own `linear_cross_entropy` has neither
    scale nor evidence.
    """
    scale = torch.ones((), device=x.device) if scale is None else scale
    return _LinearCrossEntropy.apply(x, weight, targets, scale, *(evidence or (None, None)), compute_dtype(x))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, scale, u, table, dtype):
        rows, places = x.flatten(0, -2), targets.flatten()
        wide = torch.promote_types(x.dtype, torch.float32)
        losses = on_device(_losses, x.device)
        lse, chosen = rows.new_empty(len(rows), dtype=wide), rows.new_empty(len(rows), dtype=wide)
        head, terms = _aligned(weight, dtype), None if u is None else _aligned(table, wide)
        for part in row_parts(rows, len(head)):
            added = None if u is None else _evidence(u.flatten(0, -2)[part], terms)
            lse[part], chosen[part] = losses(rows[part], places[part], head, scale, added, len(weight), wide)
        ctx.save_for_backward(x, weight, targets, scale, u, table, lse)
        ctx.dtype = dtype
        return (lse - chosen).view(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, targets, scale, u, table, lse = ctx.saved_tensors
        rows, places, grads = x.flatten(0, -2), targets.flatten(), grad.flatten().to(lse.dtype)
        gradient = on_device(_gradient, x.device)
        head, terms = _aligned(weight, ctx.dtype), None if u is None else _aligned(table, lse.dtype)
        grad_rows, grad_weight = torch.empty_like(rows), weight.new_zeros(head.shape)
        grad_u = grad_table = added = None
        if u is not None:
            u_rows = u.flatten(0, -2)
            grad_u, grad_table = torch.empty_like(u_rows), table.new_zeros(terms.shape)
        for part in row_parts(rows, len(head)):
            if u is not None:
                own = u_rows[part]
                with made_again():
                    added = _evidence(own, terms)
            narrow, d_logits = gradient(rows[part], places[part], head, scale, added, len(weight), lse[part],
                                        grads[part])
            if u is not None:
                low = min(d_logits.dtype, table.dtype, key=lambda dtype: dtype.itemsize)
                grad_u[part] = d_logits.to(low) @ terms.to(low)
                grad_table = plus_product(grad_table, d_logits.T.to(low), own.to(low))
            narrow = narrow.to(ctx.dtype)
            grad_rows[part] = narrow @ head
            grad_weight = plus_product(grad_weight, narrow.T, rows[part].to(ctx.dtype))
        grad_scale = (grad_rows.to(lse.dtype) * rows).sum().to(scale.dtype)
        if u is not None:
            grad_u, grad_table = grad_u.view_as(u), grad_table[:len(table)]
        return (grad_rows.mul_(scale).view_as(x), grad_weight[:len(weight)].mul_(scale), None, grad_scale, grad_u,
                grad_table, None)


def _losses(rows: Tensor, places: Tensor, head: Tensor, scale: Tensor, added: Tensor | None, vocab: int,
            wide: torch.dtype) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """(log-sum-exp, logit of the target) of every row of a chunk."""
    logits = _logits(rows, head, scale, added, vocab, wide)
    return torch.logsumexp(logits, 1), logits.gather(1, places[:, None]).squeeze(1)


def _gradient(rows: Tensor, places: Tensor, head: Tensor, scale: Tensor, added: Tensor | None, vocab: int,
              lse: Float[Tensor, "rows"], grads: Float[Tensor, "rows"]) -> tuple[Tensor, Tensor]:
    """Gradient of a chunk's logits, `grads * (softmax - one-hot)`: for the products with the head and for those of the
    evidence. Compiled, both read one in the dtype of the head, which saves a fifth of the traffic; else the evidence's
    are not rounded."""
    with made_again():
        d_logits = _logits(rows, head, scale, added, vocab, lse.dtype)
    if torch.compiler.is_compiling():  # a scatter would be a pass of its own
        chosen = torch.arange(len(head), device=rows.device) == places[:, None]
        d_logits = ((d_logits - lse[:, None]).exp() - chosen.to(lse.dtype)) * grads[:, None]
        narrow = d_logits.to(head.dtype)
        return narrow, narrow
    d_logits.sub_(lse[:, None]).exp_()
    d_logits.scatter_add_(1, places[:, None], d_logits.new_full((len(d_logits), 1), -1))
    d_logits.mul_(grads[:, None])
    return d_logits, d_logits  # rounded after the evidence's products, so that a CPU's cache holds one of the two


def _logits(rows: Tensor, head: Tensor, scale: Tensor, added: Tensor | None, vocab: int,
            wide: torch.dtype) -> Float[Tensor, "rows padded"]:
    """`scale * (rows @ head.T) + added`; minus infinity from column `vocab` on."""
    logits = (rows.to(head.dtype) @ head.T).to(wide).mul_(scale)
    if added is not None:
        logits.add_(added)
    if vocab < len(head):
        logits[:, vocab:] = -torch.inf
    return logits


def _evidence(u: Float[Tensor, "rows terms"], table: Float[Tensor, "vocab terms"]) -> Float[Tensor, "rows vocab"]:
    """`u @ table.T` in the dtype of the table, never rounded to bf16."""
    with torch.autocast(u.device.type, enabled=False):
        return u.to(table.dtype) @ table.T


class Chunking(NamedTuple):
    """Chunk sizes of the logits on a kind of device: about `num_logits` at once; rows and vocabulary in multiples of
    `rows` and `vocab`, which its matrix products need for full speed."""

    num_logits: int
    rows: int = 1
    vocab: int = 1


CHUNKING = {"cpu": Chunking(2**20), "cuda": Chunking(2**28, rows=256, vocab=64)}
"""On a CPU logits stay in its cache. On CUDA every chunk reads and writes the gradient of the whole head once."""


def chunking(device: torch.device) -> Chunking:
    return CHUNKING.get(device.type, Chunking(2**26))


def row_parts(rows: Tensor, vocab: int) -> list[slice]:
    """Runs of rows whose logits are computed at once; if their number is rounded, of nearly equal length, so that most
    batches have chunks of one shape."""
    most, multiple, _ = chunking(rows.device)
    length = max(128, most // vocab)
    if multiple > 1:
        length = max(multiple, length // multiple * multiple)
        even = -(-len(rows) // max(1, -(-len(rows) // length)))
        length = max(multiple, -(-even // multiple) * multiple)
    return [slice(start, start + length) for start in range(0, len(rows), length)]


def _aligned(table: Float[Tensor, "vocab inner"], dtype: torch.dtype) -> Float[Tensor, "padded inner"]:
    """A table in another dtype, with rows of zeros up to the multiple that the device needs. No token is padded in the
    model itself: its tables, checkpoints and predictions have the tokens alone."""
    vocab = len(table)
    extra = -vocab % chunking(table.device).vocab
    if not extra:
        return table.to(dtype)
    padded = table.new_zeros(vocab + extra, table.shape[1], dtype=dtype)
    padded[:vocab] = table
    return padded


def plus_product(total: Float[Tensor, "m n"], a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]) -> Tensor:
    """`total + a @ b`, in place outside of a compiled function. On recent CUDA devices the product adds to a float32
    total itself, so that no product is rounded to bf16, and total is read and written once."""
    if not (total.dtype == a.dtype or (total.dtype == torch.float32 and a.dtype in HALF)):  # all that products offer
        return total.add_(a @ b)
    if torch.compiler.is_compiling():
        return total + (torch.mm(a, b, out_dtype=total.dtype) if total.is_cuda else a @ b)
    if is_recent_cuda(total.device):
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.add_(a @ b)
