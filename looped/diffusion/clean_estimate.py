"""The clean estimate D from the logits of a denoiser: the embedding that they predict, which the solver steps to.

- `soft`: the expectation `softmax(logits) @ table`, which shrinks when the model is uncertain.
- `hard`: the most likely row.
- `top-k`: the expectation over the k most likely tokens.
- `sampled`: a row drawn from the softmax.
"""

import torch
from torch import Tensor

from looped.devices import to_like, widest
from looped.errors import UserError, did_you_mean
from looped.tensor_types import Float, Float64, Int64

BRIDGES = ("soft", "hard", "top-k", "sampled")


def bridge(kind: str, logits: Float[Tensor, "*batch vocab"], table: Float[Tensor, "vocab dim"], *, top_k: int = 8,
           temperature: float = 1.0, uniform: Float64[Tensor, "*batch"] | None = None) -> Float[Tensor, "*batch dim"]:
    """The clean estimate D, computed in float32 regardless of the logits' dtype and of autocast.

    Raises `UserError` for an unknown kind, a temperature that is not positive, and `sampled` without `uniform` draws.
    """
    if kind not in BRIDGES:
        raise UserError(f"bridge '{kind}' is unknown{did_you_mean(kind, BRIDGES)}")
    if temperature <= 0:
        raise UserError(f"temperature {temperature} is not positive; use the hard bridge for the most likely row")
    if kind == "hard":
        return table[logits.argmax(-1)].float()
    with torch.autocast(logits.device.type, enabled=False):
        return _average_or_draw(kind, logits.float() / temperature, table, top_k, uniform)


def _average_or_draw(kind: str, scaled: Tensor, table: Tensor, top_k: int, uniform: Tensor | None) -> Tensor:
    if kind == "top-k":
        values, places = scaled.topk(min(top_k, scaled.shape[-1]), dim=-1)
        return (values.softmax(-1).unsqueeze(-2) @ table[places].float()).squeeze(-2)
    probs = scaled.softmax(-1)
    if kind == "soft":
        return probs @ table.float()
    if uniform is None:
        raise UserError("the sampled bridge draws at random; pass uniform=, a number in [0, 1) for each row")
    return table[draw(probs, uniform)].float()


def draw(probs: Float[Tensor, "*batch vocab"], uniform: Float64[Tensor, "*batch"]) -> Int64[Tensor, "*batch"]:
    """One token per row, drawn by inverse CDF at `uniform`; each draw depends on its own row only."""
    cumulative = probs.to(widest(probs.device)).cumsum(-1)
    places = (to_like(uniform, cumulative).unsqueeze(-1) * cumulative[..., -1:]).contiguous()
    return torch.searchsorted(cumulative, places, right=True).squeeze(-1).clamp_max(probs.shape[-1] - 1)
