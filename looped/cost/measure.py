"""FLOPs of a training step, and the bytes that it keeps for backward: of any rule, model and kind of data, by running
it.

A step is run on tensors without values (torch's fake tensors), so nothing is computed and next to nothing allocated;
what is drawn and what is given, levels, depths and tokens, is real. Counted are FLOPs of matrix products, a
multiplication with its addition as two, and of attention the pairs that its mask allows: L (L + 1) / 2 a head where
causal, also of blocks, for which SDPA's kernel works out all L x 2L. Products that backward makes a second time
(attention scores, logits, what a gate of short rows multiplies, checkpointed layers) are left out: they buy memory, not
training; so is the algebra of a fixed-point solver.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from looped.data.labelled import SoughtImages
from looped.domains.base import Inputs
from looped.errors import UserError
from looped.models.build import unseeded
from looped.nn import fused
from looped.nn.recurrence import OwnBlock
from looped.objectives import Objective, build_objective
from looped.rng import StepRandom

ASKS_FOR_VALUES = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)
"""The errors of tensors without values that are asked for one."""


@dataclass(frozen=True)
class StepCost:
    """The cost of forward and backward of one micro-batch. flops: those of all forward passes, and those of backward.
    kept: bytes that autograd keeps, parameters left out; under bf16 the bf16 copies of the weights are in. gradients:
    numbers in the gradients it leaves."""

    forward_flops: int
    backward_flops: int
    kept: int
    gradients: int


@contextmanager
def no_values(mode: FakeTensorMode) -> Iterator[None]:
    """Parameters made inside are registered without values; buffers have theirs."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not isinstance(parameter, FakeTensor):
            parameter = nn.Parameter(_fake(mode, parameter.detach()), parameter.requires_grad)
        register(module, name, parameter)

    # trunc_normal_ draws again until it sees no value outside of its range; a block of one's own is read on a trial.
    with (patch.object(nn.Module, "register_parameter", registered),
          patch.object(OwnBlock, "check", lambda block, *widths: None),
          patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor)):
        yield


def fake_mode() -> FakeTensorMode:
    """The mode of tensors without values, which meets real ones, and losses of some of the rows."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def _fake(mode: FakeTensorMode, tensor: Tensor) -> FakeTensor:
    return FakeTensor(mode, tensor.to("meta"), torch.device("cpu"))


class Unvalued(StepRandom):
    """Normal draws without values, and decisions that are made beforehand."""

    def __init__(self, mode: FakeTensorMode, count: int, decisions: Mapping[str, Any]):
        super().__init__(0, 0, count=count)
        self.mode = mode
        self.decisions = decisions

    def decide(self, name: str, draw: Callable[[], Any]) -> Any:
        return self.decisions[name] if name in self.decisions else draw()

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        return _fake(self.mode, torch.empty(self.count, *shape, device="meta"))


class FakeTraining:
    """A config's training on tensors without values, on a processor, whose SDPA computes any attention."""

    def __init__(self, config: Config, inputs: Inputs):
        self.config: Config = config.replace(**{"model.attention": "auto"})
        self.mode: FakeTensorMode = fake_mode()
        config = self.config
        with no_values(self.mode):
            model = unseeded(config, inputs.vocab_size, inputs.picture)
            self.objective: Objective = build_objective(config, model, inputs.end_of_text).train()
        self.objective.without_values()

    def step(self, part: Tensor | Batch | SoughtImages, decisions: Mapping[str, Any]) -> StepCost:
        """The cost of a micro-batch in a training step of these decisions. Raises UserError for a rule that asks for
        values."""
        random = Unvalued(self.mode, len(part), decisions)

        def loss() -> Tensor:
            with autocast(self.config.training.precision):
                return self.objective(part, random).value

        self.objective.zero_grad()
        try:
            with Products() as forward:
                kept, value = kept_bytes(loss, self.objective)
            backward = flops_of(value.backward)
        except ASKS_FOR_VALUES as error:
            said = str(error).split("\n", 1)[0]
            raise UserError(f"objective {self.config.objective} asks for a value in a training step, and costs are "
                            f"counted without ({said}); draw what the cost depends on by random.decide and list it in "
                            f"decisions(), or run to the limit after without_values()") from error
        return StepCost(forward.get_total_flops(), backward, kept,
                        sum(p.numel() for p in self.objective.parameters() if p.grad is not None))


def kept_bytes(function: Callable[[], Any], module: nn.Module) -> tuple[int, Any]:
    """(bytes that autograd keeps for the backward pass of `function`, every storage once, without `module`'s own; what
    it returns)."""
    own = {_place(tensor) for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, Tensor] = {}  # holds the tensors: a storage that was freed could lend its place to another

    def pack(tensor: Tensor) -> Tensor:
        if _place(tensor) not in own:
            kept[_place(tensor)] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), result


def flops_of(function: Callable[[], Any]) -> int:
    """FLOPs of a function that may go forward and backward."""
    with Products() as products, patch.object(fused, "made_again", products.left_out):
        function()
    return products.get_total_flops()


def _place(tensor: Tensor) -> int:
    """The identity of a storage, also of one without values."""
    return tensor.untyped_storage()._cdata


def autocast(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


# ----------------------------------------------------------------------------- FLOPs


class Products(FlopCounterMode):
    """FLOPs of the matrix products inside, attention's by its mask."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=KERNELS)
        self.mod_tracker: _Everywhere = _Everywhere()
        self._again = 0

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Products inside do not count."""
        before = self.get_total_flops()
        yield
        self._again += self.get_total_flops() - before

    def get_total_flops(self) -> int:
        return super().get_total_flops() - self._again


class _Everywhere:
    """Instead of torch's record of which module is at work, whose hooks stand in the way of a gradient in backward."""

    parents: tuple[str, ...] = ("Global",)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, is_causal: bool = False, *,
               attn_mask: Tensor | None = None, **kwargs: Any) -> int:
    """Two products over the pairs that a mask allows."""
    batch, heads, length, dim = q.shape
    pairs = batch * (length * (length + 1) // 2 if is_causal else length * k.shape[-2])
    if attn_mask is not None and not isinstance(attn_mask, FakeTensor):
        allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1
        pairs = int(allowed.expand(batch, 1, -1, -1).sum())
    return 2 * 2 * heads * dim * pairs


def _attention_backward(*args: Any, **kwargs: Any) -> int:
    """Four products; the fifth makes the scores again."""
    _, q, k, v, _, _, dropout, is_causal = args
    return 2 * _attention(q, k, v, dropout, is_causal, **kwargs)


for _formula in (_attention, _attention_backward):
    _formula._get_raw = True  # the mask itself, not its shape
KERNELS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
           torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward}
"""SDPA's kernel of a CPU, which torch's own counter does not know."""
