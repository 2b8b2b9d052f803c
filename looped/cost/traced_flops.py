"""FLOPs of a training step and the bytes it keeps for backward, for any rule, model and kind of data, by running it.

A step runs on torch's fake tensors, so nothing is computed and next to nothing allocated; sampled levels and depths,
and the tokens, are real. FLOPs are those of matrix products, two per multiply-add, and of attention over the pairs that
its mask allows: L (L + 1) / 2 per head if causal, also for blocks, where SDPA's kernel computes all L x 2L. Products
recomputed in backward (attention scores, logits, what a gate of short rows multiplies, checkpointed layers) do not
count, because they save memory and do no training; neither does the algebra of a fixed-point solver.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils.flop_counter import FlopCounterMode

from looped.config import Config
from looped.data.batch import Batch
from looped.data.image_batches import SoughtImages
from looped.domains.base import Inputs
from looped.errors import UserError
from looped.models.build import unseeded
from looped.nn import fused
from looped.nn.blocks import OwnBlock
from looped.nn.wide_attention import counted_for
from looped.objectives import Objective, build_objective
from looped.precision import Precision, training_device
from looped.rng import StepRandom

ASKS_FOR_VALUES = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)
"""Errors that torch raises when the value of a fake tensor is read."""


@dataclass(frozen=True)
class StepCost:
    """Cost of forward and backward on one micro-batch. forward_flops: of all forward passes. kept: bytes that autograd
    keeps, without parameters, but with their bf16 copies under bf16. gradients: number of elements in the gradients."""

    forward_flops: int
    backward_flops: int
    kept: int
    gradients: int


@contextmanager
def no_values(mode: FakeTensorMode) -> Iterator[None]:
    """Register parameters made inside the block as fake tensors; buffers stay real."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not isinstance(parameter, FakeTensor):
            parameter = nn.Parameter(_fake(mode, parameter.detach()), parameter.requires_grad)
        register(module, name, parameter)

    # trunc_normal_ redraws until all values are in range; OwnBlock.check runs a custom block on a trial input.
    with (patch.object(nn.Module, "register_parameter", registered),
          patch.object(OwnBlock, "check", lambda block, *widths: None),
          patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor)):
        yield


def fake_mode() -> FakeTensorMode:
    """A fake-tensor mode that allows real inputs, and shapes that depend on data, as in the loss of some rows."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def _fake(mode: FakeTensorMode, tensor: Tensor) -> FakeTensor:
    return FakeTensor(mode, tensor.to("meta"), torch.device("cpu"))


class Unvalued(StepRandom):
    """Random draws for fake training: fake normal draws, and decisions that are given in advance."""

    def __init__(self, mode: FakeTensorMode, count: int, decisions: Mapping[str, Any]):
        super().__init__(0, 0, count=count)
        self.mode = mode
        self.decisions = decisions

    def decide(self, name: str, draw: Callable[[StepRandom], Any]) -> Any:
        return self.decisions[name] if name in self.decisions else draw(self)

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        return _fake(self.mode, torch.empty(self.count, *shape, device="meta"))


class FakeTraining:
    """Training of a config on fake tensors, on the CPU, whose SDPA computes any attention, in the `precision` of the
    device that training would take."""

    def __init__(self, config: Config, inputs: Inputs):
        self.config: Config = config.replace(**{"model.attention": "auto"})
        self.precision: Precision = Precision.of(config, training_device())
        self.mode: FakeTensorMode = fake_mode()
        config = self.config
        with no_values(self.mode):
            model = unseeded(config, inputs.vocab_size, inputs.picture)
            self.objective: Objective = build_objective(config, model, inputs.end_of_text).train()
        self.objective.without_values()

    def step(self, part: Tensor | Batch | SoughtImages, decisions: Mapping[str, Any]) -> StepCost:
        """Cost of a micro-batch in a training step with these decisions. Raises UserError if the rule reads the value
        of a tensor."""
        random = Unvalued(self.mode, len(part), decisions)

        def loss() -> Tensor:
            with self.precision.autocast(), counted_for(training_device()):
                return self.objective(part, random).value

        self.objective.zero_grad()
        try:
            with Products() as forward:
                kept, value = kept_bytes(loss, self.objective)
            backward = flops_of(value.backward)
        except ASKS_FOR_VALUES as error:
            said = str(error).split("\n", 1)[0]
            raise UserError(f"objective {self.config.objective} reads the value of a tensor in a training step, but "
                            f"costs are counted on tensors without values ({said}); draw what the cost depends on with "
                            f"random.decide and list it in decisions(), or run to the limit after without_values()"
                            ) from error
        return StepCost(forward.get_total_flops(), backward, kept,
                        sum(p.numel() for p in self.objective.parameters() if p.grad is not None))


def kept_bytes(function: Callable[[], Any], module: nn.Module) -> tuple[int, Any]:
    """(bytes that autograd keeps for the backward pass of `function`, result of `function`). Each storage counts once;
    parameters and buffers of `module` do not count."""
    own = {_place(tensor) for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, Tensor] = {}  # keeps the tensors alive: the address of a freed storage could be reused

    def pack(tensor: Tensor) -> Tensor:
        if _place(tensor) not in own:
            kept[_place(tensor)] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), result


def flops_of(function: Callable[[], Any]) -> int:
    """FLOPs of a function, which may run forward and backward."""
    with Products() as products, patch.object(fused, "made_again", products.left_out):
        function()
    return products.get_total_flops()


def _place(tensor: Tensor) -> int:
    """Identity of a storage, also for fake tensors."""
    return tensor.untyped_storage()._cdata


# ----------------------------------------------------------------------------- FLOPs


class Products(FlopCounterMode):
    """Counter of the FLOPs of matrix products inside the block, with attention counted by its mask."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=KERNELS)
        self.mod_tracker: _Everywhere = _Everywhere()
        self._again = 0

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Leave the products inside the block out of the count."""
        before = self.get_total_flops()
        yield
        self._again += self.get_total_flops() - before

    def get_total_flops(self) -> int:
        return super().get_total_flops() - self._again


class _Everywhere:
    """Replacement of torch's tracker of the running module, whose hooks prevent taking a gradient inside backward."""

    parents: tuple[str, ...] = ("Global",)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, is_causal: bool = False, *,
               attn_mask: Tensor | None = None, **kwargs: Any) -> int:
    """FLOPs of attention: two products over the pairs that the mask allows."""
    batch, heads, length, dim = q.shape
    pairs = batch * (length * (length + 1) // 2 if is_causal else length * k.shape[-2])
    if attn_mask is not None and not isinstance(attn_mask, FakeTensor):
        allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1
        pairs = int(allowed.expand(batch, 1, -1, -1).sum())
    return 2 * 2 * heads * dim * pairs


def _attention_backward(*args: Any, **kwargs: Any) -> int:
    """FLOPs of attention's backward: four products; the fifth recomputes the scores and does not count."""
    _, q, k, v, _, _, dropout, is_causal = args
    return 2 * _attention(q, k, v, dropout, is_causal, **kwargs)


for _formula in (_attention, _attention_backward):
    _formula._get_raw = True  # the mask itself, not its shape
KERNELS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
           torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward}
"""FLOP formulas of SDPA's CPU kernel, which torch's own counter lacks."""
