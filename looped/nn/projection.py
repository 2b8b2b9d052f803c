"""Products with linear layers and embeddings: by their weight if they are plain modules, else by a call of the module.

The memory-saving functions of fused.py take a weight and bypass its module. If the module was replaced (LoRA, a
quantised layer), extended (a parametrization, a hook) or has a bias, the module itself is called.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looped.nn.fused import Activation, activated, project
from looped.tensor_types import Float


def is_plain(module: nn.Module) -> bool:
    """True if the weight alone determines the module's output: torch's own `Linear` without a bias or `Embedding`,
    with no hook, no parametrization and no replaced forward."""
    if type(module) is nn.Linear:
        plain = module.bias is None
    else:
        plain = type(module) is nn.Embedding and module.max_norm is None
    return plain and "forward" not in module.__dict__ and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def project_by(linear: nn.Module, x: Float[Tensor, "batch length inner"], *, gate: Tensor | None = None,
               activation: Activation | None = None) -> Float[Tensor, "batch length width"]:
    """`gate * linear(h)` with `h = x` or the `activation` of x; shapes and saved tensors as in `project`."""
    if is_plain(linear):
        return project(x, linear.weight, gate=gate, activation=activation)
    out = linear(activated(x, activation))
    return out if gate is None else out * gate


def table_of(embedding: nn.Module, num: int) -> Float[Tensor, "num width"]:
    """The first `num` vectors of an embedding, with gradient; a module that is not plain is called."""
    if not is_plain(embedding):
        return embedding(torch.arange(num, device=next(embedding.parameters()).device))
    return embedding.weight if len(embedding.weight) == num else embedding.weight[:num]


def has_plain_head(model: Any) -> bool:
    """True if a model's logits need only its `head_weight`: it has no module `head`, or a plain one."""
    head = getattr(model, "head", None)
    return head is None or is_plain(head)


def head_logits(model: Any, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch vocab"]:
    """Logits from the input of a model's head (`model.hidden`)."""
    return F.linear(hidden, model.head_weight) if has_plain_head(model) else model.head(hidden)


def cast_for(linear: nn.Module, x: Tensor) -> Tensor:
    """x in the dtype of a module's weight; in float32 if that is packed or quantised."""
    weight = getattr(linear, "weight", None)
    floats = isinstance(weight, Tensor) and weight.is_floating_point()
    return x.to(weight.dtype if floats else torch.float32)
