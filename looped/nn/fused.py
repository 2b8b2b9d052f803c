"""Norms and projections that keep less for the backward pass than their plain forms.

Under BPTT every saved tensor is paid once a loop step. `rms_norm` keeps its input and one number a row, and carries
the AdaLN modulation for free. `project` keeps the two halves of SwiGLU and rebuilds their product, and differentiates
a per-sequence output gate without keeping the ungated output. Values and gradients are those of the plain formulas.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
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
