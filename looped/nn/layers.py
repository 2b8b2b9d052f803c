"""The Transformer layer: RMSNorm, rotary positions, grouped-query attention, SwiGLU or GELU, four norm placements.

Conditioned layers take AdaLN's shift, scale and gate, which save no extra activation (see fused.py).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from looped.errors import UserError, did_you_mean
from looped.nn.attention import attention, context_attention
from looped.nn.cache import LayerCache
from looped.nn.conditioning import Modulation
from looped.nn.frequencies import Frequencies
from looped.nn.fused import Activation, rms_norm
from looped.nn.projection import project_by
from looped.nn.rows import Rotation, Rows
from looped.tensor_types import Float

BIASES = ("none", "qk", "qkv")

class Norms(NamedTuple):
    """The norms of a layer: before each branch, after each branch, and the latter on the sum with the residual."""

    before: bool
    after: bool
    on_sum: bool = False


BLOCKS = {"prenorm": Norms(True, False), "sandwich": Norms(True, True, on_sum=True), "branch": Norms(True, True),
          "postnorm": Norms(False, True), "original": Norms(False, True, on_sum=True)}
State = Float[Tensor, "batch length width"]


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain, then AdaLN's scale and shift if given."""

    def __init__(self, width: int, *, eps: float = 1e-6):
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps, scale=scale, shift=shift)


class Plain(nn.Module):
    """Identity in place of a norm."""

    def forward(self, x: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return x


class Rotary(Frequencies):
    """Rotary positions (Su et al. 2021), halves convention, angles in float32.

    Positions may have several axes, such as the row and the column of a cell: pair j of coordinates then rotates
    with axis j mod A, and each axis has the whole range of frequencies. `scaling`: a function of the frequencies
    (K / 2,), float64. `gain`: a factor of cos and sin, and so of the rotated queries and keys.
    """

    def __init__(self, head_dim: int, *, base: float = 10_000.0, scaling: Callable[[Tensor], Tensor] | None = None,
                 gain: float = 1.0):
        super().__init__(head_dim // 2)
        self.head_dim = head_dim
        self.base = base
        self.scaling = scaling
        self.gain = gain
        self.reset_frequencies()

    def computed(self) -> Tensor:
        exponents = -torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu") / self.head_dim
        inverse = self.base ** exponents
        return inverse if self.scaling is None else self.scaling(inverse)

    def forward(self, positions: Tensor) -> Rotation:
        """(cos, sin), each (1 or B, L, 1, K / 2), for positions (L,) or (B, L), or with axes (B, L, A)."""
        if positions.ndim < 3:
            positions = positions.reshape(-1, positions.shape[-1], 1)  # B L 1
        axes, num = positions.shape[-1], len(self.frequencies)
        if axes > num:
            raise UserError(f"positions of {axes} axes need heads of {2 * axes} coordinates, these have {2 * num}; "
                            f"set model.num_heads lower or model.width higher")
        pair = torch.arange(num, device=positions.device)
        angles = positions.float()[..., pair % axes].unsqueeze(2) * self.frequencies[pair // axes * axes]  # B L 1 K/2
        turn = angles.cos(), angles.sin()
        return turn if self.gain == 1 else (self.gain * turn[0], self.gain * turn[1])


def llama3_scaling(frequencies: Tensor, *, factor: float, low: float, high: float, original_length: int) -> Tensor:
    """Llama 3.1's scaling: frequencies with wavelengths above original_length / low are divided by the factor, those
    below original_length / high stay, those between are interpolated (transformers, `rope_type` llama3)."""
    turns = original_length * frequencies / (2 * math.pi)
    return _divided(frequencies, ((turns - low) / (high - low)).clamp(0, 1), factor)


def yarn_scaling(frequencies: Tensor, *, factor: float, betas: tuple[float, float], original_length: int, base: float,
                 truncate: bool = True) -> Tensor:
    """YaRN's scaling (Peng et al. 2023, arXiv 2309.00071, section 3.2): frequencies that turn `betas[0]` times in
    `original_length` tokens stay, those that turn `betas[1]` times are divided by the factor, those between are
    interpolated linearly in their index j = K ln(original_length / (2 pi turns)) / (2 ln base). `truncate`: the ramp
    runs from the whole number below its first index to the one above its last (transformers, `rope_type` yarn)."""
    head_dim = 2 * len(frequencies)
    first, last = (head_dim * math.log(original_length / (2 * math.pi * turns)) / (2 * math.log(base))
                   for turns in betas)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    last += 0.001 if first == last else 0  # a ramp of length 0 would divide by zero
    numbers = torch.arange(len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
    return _divided(frequencies, 1 - ((numbers - first) / (last - first)).clamp(0, 1), factor)


def linear_scaling(frequencies: Tensor, *, factor: float) -> Tensor:
    """Position interpolation: all frequencies divided by the factor (Chen et al. 2023, arXiv 2306.15595)."""
    return frequencies / factor


def yarn_gain(factor: float) -> float:
    """YaRN's factor of both queries and keys, which keeps the entropy of attention constant for longer texts."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def _divided(frequencies: Tensor, kept: Tensor, factor: float) -> Tensor:
    """Frequencies divided by the factor, except for the fraction `kept` of each."""
    return frequencies * (kept + (1 - kept) / factor)


def rotate(x: Float[Tensor, "batch length heads dim"], rotation: Rotation) -> Float[Tensor, "batch length heads dim"]:
    """Rotate each pair of coordinates by its angle; saves only the angles for backward."""
    if torch.compiler.is_compiling():  # cannot write into half of a tensor, but fuses the products itself
        cos, sin = (part.to(x.dtype) for part in rotation)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return _Rotate.apply(x, *rotation)


class _Rotate(torch.autograd.Function):
    """Rotation whose backward pass rotates the gradient back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _turned(grad, *ctx.saved_tensors, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x with each pair rotated. The halves are written in place: the four products are the only passes over memory."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    out = torch.empty_like(x)
    (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
    return out


class Attention(nn.Module):
    """Grouped-query self-attention over the sequence, or over a context and the row itself.

    head_dim: width / num_heads if None. bias: on queries and keys (`qk`), on values too (`qkv`). qk_norm: over each
    head (True), or over the `whole` projection. rotary: False for a layer without positions.
    """

    def __init__(self, width: int, num_heads: int, *, num_kv_heads: int | None = None, head_dim: int | None = None,
                 bias: str = "none", qk_norm: bool | str = False, rotary: bool = True, eps: float = 1e-6,
                 backend: str = "auto"):
        super().__init__()
        if bias not in BIASES:
            raise UserError(f"bias '{bias}' is unknown{did_you_mean(bias, BIASES)}")
        self.num_heads = num_heads
        self.num_kv_heads: int = num_kv_heads or num_heads
        self.head_dim: int = head_dim or width // num_heads
        self.rotary = rotary
        self.backend = backend
        inner, outer = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q: nn.Linear = nn.Linear(width, inner, bias="q" in bias)
        self.k: nn.Linear = nn.Linear(width, outer, bias="k" in bias)
        self.v: nn.Linear = nn.Linear(width, outer, bias="v" in bias)
        self.out: nn.Linear = nn.Linear(inner, width, bias=False)
        self.whole: bool = qk_norm == "whole"
        self.q_norm: RMSNorm | None = RMSNorm(inner if self.whole else self.head_dim, eps=eps) if qk_norm else None
        self.k_norm: RMSNorm | None = RMSNorm(outer if self.whole else self.head_dim, eps=eps) if qk_norm else None

    def queries(self, x: State, rotation: Rotation) -> Float[Tensor, "batch length heads dim"]:
        return self._placed(self.q(x), self.q_norm, rotation)

    def keys_values(self, x: State, rotation: Rotation) -> tuple[Tensor, Tensor]:
        v = self.v(x).unflatten(-1, (self.num_kv_heads, self.head_dim))  # B L G K
        return self._placed(self.k(x), self.k_norm, rotation), v

    def _placed(self, x: Tensor, norm: RMSNorm | None, rotation: Rotation) -> Float[Tensor, "batch length heads dim"]:
        x = norm(x) if norm is not None and self.whole else x
        x = x.unflatten(-1, (-1, self.head_dim))
        x = norm(x) if norm is not None and not self.whole else x
        return rotate(x, rotation) if self.rotary else x

    def forward(self, x: State, rows: Rows, *, gate: Tensor | None = None) -> State:
        """Attention among the rows under their mask, appending to their cache. With a context and a mask: over context
        rows and these rows together. With a context alone: each row attends to the context rows up to its own place
        (`strict`: before it) and to itself."""
        context = rows.context
        if rows.strict and (context is None or rows.mask is not None):
            raise UserError("strict selects the rows of a context to attend to if there is no mask; "
                            "pass it with context= and without mask=, or leave it out")
        q = self.queries(x, rows.rotation)
        k, v = self.keys_values(x, rows.rotation)
        if context is not None and rows.mask is None:
            mixed = context_attention(q, context.k, context.v, k, v, strict=rows.strict, backend=self.backend)
        else:
            if context is not None:
                k, v = context.followed_by(k, v)
            elif rows.cache is not None:
                k, v = rows.cache.append(k, v)
            mixed = attention(q, k, v, rows.mask, backend=self.backend)
        return project_by(self.out, mixed.flatten(-2), gate=gate)  # B L H K -> B L (H K)


class FeedForward(nn.Module):
    """`W_out activation(W_in x)`, with the hidden width `hidden`."""

    def __init__(self, width: int, hidden: int, activation: Activation = "swiglu"):
        super().__init__()
        self.activation = activation
        self.in_: nn.Linear = nn.Linear(width, hidden * (2 if activation == "swiglu" else 1), bias=False)
        self.out: nn.Linear = nn.Linear(hidden, width, bias=False)

    def forward(self, x: State, *, gate: Tensor | None = None) -> State:
        return project_by(self.out, self.in_(x), gate=gate, activation=self.activation)


class Scaled(nn.Module):
    """A tensor times a fixed number."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class TransformerLayer(nn.Module):
    """Attention and a feed-forward network, each a residual branch.

    prenorm:  x = x + attn(n1(x));      x = x + mlp(n3(x))
    sandwich: x = n2(x + attn(n1(x)));  x = n4(x + mlp(n3(x)))      (Huginn)
    branch:   x = x + n2(attn(n1(x)));  x = x + n4(mlp(n3(x)))      (Ouro)
    postnorm: x = x + n2(attn(x));      x = x + n4(mlp(x))          (OLMo2)
    original: x = n2(x + attn(x));      x = n4(x + mlp(x))          (Vaswani et al. 2017; HRM, TRM)

    Other arguments are those of `Attention`. A conditioned layer modulates n1 and n3, which postnorm and original lack;
    `modulation` replaces the one for `cond_width`. `branch_scale` multiplies what each branch adds to the residual.
    `checkpointed`: save only the inputs for backward, which runs the layer again (Chen et al. 2016, arXiv 1604.06174)
    with the same draws, such as those of an adapter's dropout; has no effect with a cache, which would be filled twice.
    """

    def __init__(self, width: int, num_heads: int, hidden: int, *, block: str = "prenorm",
                 cond_width: int | None = None, modulation: Modulation | None = None, branch_scale: float = 1.0,
                 eps: float = 1e-6, checkpointed: bool = False, activation: Activation = "swiglu", **attention: Any):
        super().__init__()
        if block not in BLOCKS:
            raise UserError(f"block '{block}' is unknown{did_you_mean(block, BLOCKS)}")
        before, after, self.on_sum = BLOCKS[block]
        if cond_width and not before:
            raise UserError(f"block {block} has no norm before its branches for the level to modulate; choose branch")
        self.checkpointed = checkpointed
        self.attn: Attention = Attention(width, num_heads, eps=eps, **attention)
        self.mlp: FeedForward = FeedForward(width, hidden, activation)
        self.on_sum: bool
        self.n1: RMSNorm | Plain
        self.n2: RMSNorm | nn.Identity
        self.n3: RMSNorm | Plain
        self.n4: RMSNorm | nn.Identity
        self.n1, self.n3 = (RMSNorm(width, eps=eps) if before else Plain() for _ in range(2))
        self.n2, self.n4 = (RMSNorm(width, eps=eps) if after else nn.Identity() for _ in range(2))
        self.branch: nn.Module = nn.Identity() if branch_scale == 1 else Scaled(branch_scale)
        self.modulation: Modulation | None = Modulation(cond_width, width) if cond_width else modulation

    def _modulate(self, cond: Tensor | None):
        if cond is None or self.modulation is None:
            return [(None, None, None)] * 2
        return self.modulation(cond)

    def forward(self, x: State, cond: Tensor | None, rows: Rows) -> State:
        """Apply the layer; `cond` (B, C) or (B, L, C) modulates it, None does not."""
        if not self.checkpointed or rows.cache is not None or not torch.is_grad_enabled():
            return self._run(x, cond, rows)

        def again(x, cond, cos, sin, k=None, v=None):
            context = None if rows.context is None else LayerCache(k, v)
            return self._run(x, cond, rows.having(rotation=(cos, sin), context=context))

        context = () if rows.context is None else (rows.context.k, rows.context.v)
        # Our modules draw nothing, but an adapter's may; to ask all modules takes as long as to keep the state.
        return checkpoint(again, x, cond, *rows.rotation, *context, use_reentrant=False, preserve_rng_state=True)

    def _run(self, x: State, cond: Tensor | None, rows: Rows) -> State:
        (shift1, scale1, gate1), (shift2, scale2, gate2) = self._modulate(cond)
        branch = self.attn(self.n1(x, scale=scale1, shift=shift1), rows, gate=gate1)
        x = self.n2(x + self.branch(branch)) if self.on_sum else x + self.branch(self.n2(branch))
        branch = self.mlp(self.n3(x, scale=scale2, shift=shift2), gate=gate2)
        return self.n4(x + self.branch(branch)) if self.on_sum else x + self.branch(self.n4(branch))

    def record(self, x: State, cache: LayerCache, *, rotation: Rotation) -> None:
        """Append the keys and values of the unconditioned rows `x` to `cache`."""
        cache.append(*self.attn.keys_values(self.n1(x), rotation))
