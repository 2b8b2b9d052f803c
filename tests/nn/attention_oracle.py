"""What the attention tests share: masks, random inputs, the dense formula, and stand-ins for CUDA's kernels."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from looped.nn.backends import expand_heads
from looped.nn.causal_kernels import CausalKernel
from looped.nn.masks import Causal, CleanNoisy, Full, Packed, Padded, SameDocument

B, L, H, K = 2, 6, 4, 8
MASKS = {
    "full": Full(),
    "causal": Causal(),
    "right padded": Padded([4, 6]),
    "left padded": Padded([4, 6], side="left", width=L),
    "padded, full": Padded([4, 6], causal=False),
    "padded, all of a row": Padded([0, 3], side="left", width=L),
    "packed": Packed(((3, 2, 1), (1, 5))),
    "packed, full": Packed(((3, 2, 1), (1, 5)), causal=False),
    "clean|noisy": CleanNoisy(3),
    "clean|noisy, strict": CleanNoisy(3, strict=True),
    "same document, causal": Causal() & SameDocument(torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]])),
    "clean|noisy, same document": CleanNoisy(3) & SameDocument(torch.tensor([[0, 1, 1], [0, 0, 0]])),
}
ONE_PIECE = [name for name in MASKS if "noisy" not in name]  # clean|noisy runs in two
IN_XFORMERS = [name for name in ONE_PIECE if "same document" not in name]


def draw(*shape, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()


def qkv(kv_heads=H, dtype=torch.float64, queries=L, keys=L, batch=B):
    return (draw(batch, queries, H, K, dtype=dtype), draw(batch, keys, kv_heads, K, dtype=dtype, seed=1),
            draw(batch, keys, kv_heads, K, dtype=dtype, seed=2))


def formula(q, k, v, allowed):
    """softmax(q k / sqrt K) v by hand; rows that see nobody are zero."""
    k, v = expand_heads(k, q.shape[2]), expand_heads(v, q.shape[2])
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
    empty = ~allowed.any(-1, keepdim=True)
    probs = torch.softmax(scores.masked_fill(~(allowed | empty), -torch.inf), -1).masked_fill(empty, 0.0)
    return torch.einsum("bhlm,bmhd->blhd", probs, v)


def same(ours, theirs, inputs, rtol=1e-10, atol=1e-12):
    """Equal values and equal gradients."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    grad = draw(*theirs.shape, dtype=theirs.dtype, seed=9).detach()
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


class Operations(TorchDispatchMode):
    """The names of the operations that run, and the number of elements of the largest tensor any of them makes."""

    def __init__(self):
        super().__init__()
        self.names, self.elements = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def xformers_stand_in(query, key, value, attn_bias=None):
    """`memory_efficient_attention` by what the bias materialises to; grouped heads come as (B, L, G, n, K)."""
    if query.ndim == 5:
        assert key.stride(3) == value.stride(3) == 0, "grouped heads were copied"
        shape, key, value = query.shape, key[..., 0, :], value[..., 0, :]
        return xformers_stand_in(query.flatten(2, 3), expand_heads(key, shape[2] * shape[3]),
                                 expand_heads(value, shape[2] * shape[3]), attn_bias).view(shape)
    sizes = query.shape[1], key.shape[1]
    allowed = torch.ones(sizes, dtype=torch.bool) if attn_bias is None else attn_bias.materialize(sizes) == 0
    return formula(query, key, value, allowed)


def kernel_stand_in():
    """A causal kernel by the formulas of the flash paper (Dao et al. 2022), padding its log-sum-exp as CUTLASS does."""

    def scores(q, k):
        raw = torch.einsum("blhd,bmhd->bhlm", q, expand_heads(k, q.shape[2])) / q.shape[-1] ** 0.5
        return raw.masked_fill(torch.ones(q.shape[1], q.shape[1]).triu(1).bool(), -torch.inf)

    def forward(q, k, v):
        s = scores(q, k)
        return torch.einsum("bhlm,bmhd->blhd", s.softmax(-1), expand_heads(v, q.shape[2])), s.logsumexp(-1)

    def backward(grad, q, k, v, out, lse):
        p = torch.exp(scores(q, k) - lse.unsqueeze(-1))
        dp = torch.einsum("blhd,bmhd->bhlm", grad, expand_heads(v, q.shape[2]))
        ds = p * (dp - (grad * out).sum(-1).transpose(1, 2).unsqueeze(-1)) / q.shape[-1] ** 0.5
        return (torch.einsum("bhlm,bmhd->blhd", ds, expand_heads(k, q.shape[2])),
                torch.einsum("bhlm,blhd->bmhd", ds, q), torch.einsum("bhlm,blhd->bmhd", p, grad))

    return CausalKernel(forward, backward)
