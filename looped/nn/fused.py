"""Norms, projections and a loss that keep less for the backward pass than their plain forms.

Under BPTT every saved tensor is paid once a loop step. `rms_norm` keeps its input and one number a row, and carries
the AdaLN modulation for free. `project` keeps the two halves of SwiGLU and rebuilds their product, and differentiates
a per-sequence output gate without keeping the ungated output. `linear_cross_entropy` never holds the logits of more
than a few rows. Values and gradients are those of the plain formulas.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products of `x` run in: autocast's where it is on, else that of `x`."""
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
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, rstd, weight, scale)
        out = (wide * rstd).mul_(weight)
        if scale is not None:
            out = torch.addcmul(shift.to(out.dtype), out, 1 + scale.to(out.dtype))
        return out.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, rstd, weight, scale = ctx.saved_tensors
        grad = grad.to(rstd.dtype)
        normed = x * rstd
        grad_scale = grad_shift = None
        gain = weight
        if scale is not None:
            grad_shift = grad.sum_to_size(scale.shape).to(scale.dtype)
            grad_scale = (grad * normed).sum_to_size(scale.shape).mul(weight).to(scale.dtype)
            gain = weight * (1 + scale.to(rstd.dtype))
        grad_weight = grad * normed
        if scale is not None:
            grad_weight = grad_weight * (1 + scale.to(rstd.dtype))
        grad_weight = grad_weight.sum_to_size(weight.shape).to(weight.dtype)
        grad = grad * gain
        along = (grad * normed).mean(-1, keepdim=True)
        grad_x = torch.addcmul(grad, normed, along, value=-1).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight, grad_scale, grad_shift, None, None


def project(x: Float[Tensor, "batch length inner"], weight: Float[Tensor, "width hidden"], *,
            gate: Tensor | None = None, swiglu: bool = False) -> Float[Tensor, "batch length width"]:
    """`gate * (h @ weight.T)` with `h = x`, or `h = silu(a) * b` for x = [a; b] under `swiglu`.

    A gate of shape (batch, 1, width) costs no saved activation; one of (batch, length, width) keeps the output.
    """
    if gate is not None and gate.shape[-2] != 1:
        return project(x, weight, swiglu=swiglu) * gate
    if gate is None and not swiglu:
        return F.linear(x, weight)
    return _Project.apply(x, weight, gate, swiglu, compute_dtype(x))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, gate, swiglu, dtype):
        # The float32 weight is kept and cast again in backward: a cast copy would count as one more activation.
        ctx.save_for_backward(x, weight, gate)
        ctx.swiglu, ctx.dtype = swiglu, dtype
        out = F.linear(_hidden(x, swiglu, dtype), weight.to(dtype))
        return out if gate is None else out * gate.to(out.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, gate = ctx.saved_tensors
        dtype = ctx.dtype
        grad = grad.to(dtype)
        hidden = _hidden(x, ctx.swiglu, dtype)
        grad_gate = None
        if gate is None:
            grad_weight = grad.flatten(0, -2).T @ hidden.flatten(0, -2)
        else:
            # One weight gradient a sequence: its inner product with the weight is the gate's gradient.
            by_sequence = grad.mT @ hidden  # B D F
            grad_gate = (by_sequence * weight).sum(-1).unsqueeze(-2).to(gate.dtype)
            grad_weight = (by_sequence * gate.mT).sum(0)
            grad = grad * gate.to(dtype)
        grad_hidden = grad @ weight.to(dtype)
        grad_x = _hidden_backward(x, grad_hidden) if ctx.swiglu else grad_hidden
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_gate, None, None


def _hidden(x: Tensor, swiglu: bool, dtype: torch.dtype) -> Tensor:
    if not swiglu:
        return x.to(dtype)
    a, b = x.chunk(2, -1)
    return F.silu(a).mul_(b).to(dtype)


def _hidden_backward(x: Tensor, grad_hidden: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    grad = torch.empty_like(x)
    grad_a, grad_b = grad.chunk(2, -1)
    torch.mul(F.silu(a), grad_hidden, out=grad_b)
    grad_a.copy_(torch.ops.aten.silu_backward(grad_hidden * b, a))
    return grad


def linear_cross_entropy(x: Float[Tensor, "batch length width"], weight: Float[Tensor, "vocab width"],
                         targets: Int[Tensor, "batch length"], *,
                         scale: Float[Tensor, ""] | None = None) -> Float[Tensor, "batch length"]:
    """Cross-entropy in nats of every row against the logits `scale * (x @ weight.T)`, in float32 or wider.

    Keeps x and one log-sum-exp a row; backward makes the logits again, some rows at a time, for one more product.
    """
    scale = torch.ones((), device=x.device) if scale is None else scale
    return _LinearCrossEntropy.apply(x, weight, targets, scale, compute_dtype(x))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, scale, dtype):
        rows, places, narrow = x.flatten(0, -2), targets.flatten(), weight.to(dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        lse, chosen = rows.new_empty(len(rows), dtype=wide), rows.new_empty(len(rows), dtype=wide)
        for part in _parts(rows, len(weight)):
            logits = _scaled_logits(rows[part], narrow, scale, wide)
            torch.logsumexp(logits, 1, out=lse[part])
            chosen[part] = logits.gather(1, places[part, None]).squeeze(1)
        ctx.save_for_backward(x, weight, targets, scale, lse)
        ctx.dtype = dtype
        return (lse - chosen).view(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, targets, scale, lse = ctx.saved_tensors
        rows, places, grads = x.flatten(0, -2), targets.flatten(), grad.flatten().to(lse.dtype)
        narrow, grad_rows = weight.to(ctx.dtype), torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight)
        for part in _parts(rows, len(weight)):
            d_logits = _scaled_logits(rows[part], narrow, scale, lse.dtype).sub_(lse[part, None]).exp_()
            d_logits.scatter_add_(1, places[part, None], d_logits.new_full((len(d_logits), 1), -1))
            d_logits = d_logits.mul_(grads[part, None]).to(ctx.dtype)
            grad_rows[part] = d_logits @ narrow
            grad_weight += d_logits.T @ rows[part].to(ctx.dtype)
        grad_scale = (grad_rows.to(lse.dtype) * rows).sum().to(scale.dtype)
        return grad_rows.mul_(scale).view_as(x), grad_weight.mul_(scale), None, grad_scale, None


def _scaled_logits(rows: Tensor, weight: Tensor, scale: Tensor, wide: torch.dtype) -> Float[Tensor, "rows vocab"]:
    return (rows.to(weight.dtype) @ weight.T).to(wide).mul_(scale)


def _parts(rows: Tensor, vocab: int) -> list[slice]:
    """Runs of rows whose logits fit a CPU's cache, or are large enough to fill a GPU."""
    length = max(128, (2**20 if rows.device.type == "cpu" else 2**26) // vocab)
    return [slice(start, start + length) for start in range(0, len(rows), length)]
