"""Placement of a model on the processes of a run: whole on each, or sharded over them (`training.shard`).

Sharded by FSDP2, each process keeps its part of the weights, their gradients, their averages and the optimiser's state.
The weights are gathered once per step, before the forward pass, and freed after the backward pass, however often the
loop uses them: gathered anew at every loop step, as the usual wrapping layer by layer has it, they would be sent as
many times as the loop is deep. Rajbhandari et al. 2020 (arXiv 1910.02054); Zhao et al. 2023 (arXiv 2304.11277).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Muon

from looped.config import Config
from looped.errors import UserError
from looped.objectives import Objective
from looped.training.checkpoint import load_module, module_tensors
from looped.training.optim import EMA, Named


class Whole:
    """The whole model on every process; DDP averages the gradients of several."""

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.module: Any = None

    def check(self, config: Config) -> None:
        """Raise UserError for settings that do not go with this layout."""

    def place(self, objective: Objective) -> None:
        """Lay out the parameters, before there is an optimiser."""

    def muon(self, matrices: Named, **settings: Any) -> Muon:
        """Muon over matrices of this layout."""
        return Muon(matrices, **settings)

    def wrap(self, objective: Objective) -> None:
        """Make the callable that computes the loss, once the rule is compiled."""
        self.module = self.accelerator.prepare_model(objective)

    def micro_batch(self, first: bool, last: bool) -> AbstractContextManager[Any]:
        """Forward and backward of a micro-batch. The processes exchange gradients after the last one only."""
        return nullcontext() if last else self.accelerator.no_sync(self.module)

    def clip(self, parameters: list[nn.Parameter], most: float) -> Tensor:
        """Clip the gradient, and return its norm before clipping."""
        return self.accelerator.clip_grad_norm_(parameters, most)

    @staticmethod
    def local(parameter: Tensor) -> Tensor:
        """The part of a parameter that this process keeps."""
        return parameter.detach()

    def spread(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Tensors of the size of whole parameters, laid out as these are; `tensors`: by the name of the parameter."""
        return dict(tensors)

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, on the first process at least; all processes call it together."""
        return dict(tensors)

    def model_tensors(self, objective: Objective) -> dict[str, Tensor]:
        """Whole tensors of a model's state, each storage once."""
        return module_tensors(objective)

    def averaged_tensors(self, objective: Objective, ema: EMA) -> dict[str, Tensor]:
        """Whole tensors of a model's state with its averages."""
        return module_tensors(objective) | dict(zip(ema.names, ema.averages, strict=True))

    def whole_model(self, objective: Objective) -> AbstractContextManager[Any]:
        """A context in which any process can run the model alone."""
        return nullcontext()

    def bare(self, objective: Objective, new: Callable[[], Objective]) -> Objective:
        """The rule with its whole model, without the wrapper of mixed precision; `new` makes one with other weights."""
        return self.accelerator.unwrap_model(self.module, keep_fp32_wrapper=False)


class Sharded(Whole):
    """Parameters sharded over all processes by FSDP2, each layer around the loop and the whole loop as a unit. Scalars,
    which cannot be cut, stay whole on every process."""

    def check(self, config: Config) -> None:
        if self.accelerator.num_processes == 1:
            raise UserError("training.shard fsdp shards the model over several processes, and there is one; start it "
                            "with torchrun, or set training.shard to none")
        if config.training.compile:
            raise UserError(f"training.shard fsdp does not go with training.compile {config.training.compile}; set it "
                            f"to false")

    def place(self, objective: Objective) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        device = self.accelerator.device.type
        self.names: list[str] = list(module_tensors(objective))
        self.scalars: list[nn.Parameter] = [p for p in objective.parameters() if p.ndim == 0]
        mesh = init_device_mesh(device, (self.accelerator.num_processes,))
        model, self.units = objective.model, []
        loop = [model.recurrence] if hasattr(model, "recurrence") else []  # a model of the user's may have none
        for part in (*getattr(model, "prelude", ()), *loop, *getattr(model, "coda", ()), objective):
            fully_shard(part, mesh=mesh, reshard_after_forward=False, ignored_params=set(self.scalars))
            part.set_reshard_after_backward(False, recurse=False)
            if hasattr(part, "record"):  # its gradient is exchanged when it is there, as that of forward
                register_fsdp_forward_method(part, "record")
            self.units.append(part)
        # Else the first unit that runs is taken for the root, which in an evaluation before the first step is a layer.
        objective._get_fsdp_state()._lazy_init()

    def muon(self, matrices: Named, **settings: Any) -> Muon:
        from looped.training.owned_muon import OwnedMuon

        return OwnedMuon(matrices, **settings)

    def wrap(self, objective: Objective) -> None:
        def run(*inputs: Any) -> Any:
            with self.accelerator.autocast():
                return objective(*inputs)

        self.module = run

    @contextmanager
    def micro_batch(self, first: bool, last: bool) -> Iterator[None]:
        if first:
            self._gather()
        self.units[-1].set_requires_gradient_sync(last)
        yield
        if last:
            self._free()
            for scalar in self.scalars:
                if scalar.grad is not None:
                    torch.distributed.all_reduce(scalar.grad)
                    scalar.grad /= self.accelerator.num_processes

    def _gather(self) -> None:
        """Gather the weights of all units, whose methods can then be called in any order, and outside of forward."""
        for handle in [unit.unshard(async_op=True) for unit in self.units]:
            handle.wait()

    def _free(self) -> None:
        for unit in self.units:
            unit.reshard()

    def clip(self, parameters: list[nn.Parameter], most: float) -> Tensor:
        grads = [_part(p.grad) for p in parameters if p.grad is not None and p.ndim]
        scalars = [p.grad for p in parameters if p.grad is not None and not p.ndim]
        squares = torch.stack([part.square().sum() for part in grads]).sum()
        torch.distributed.all_reduce(squares)
        norm = torch.stack([squares, *(scalar.square() for scalar in scalars)]).sum().sqrt()
        if math.isfinite(most):
            factor = (most / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
            torch._foreach_mul_([*grads, *scalars], factor)
        return norm

    @staticmethod
    def local(parameter: Tensor) -> Tensor:
        return _part(parameter.detach())

    def spread(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        from torch.distributed.tensor import distribute_tensor

        def part(tensor: Tensor, like: Any) -> Tensor:
            return distribute_tensor(tensor, like.device_mesh, like.placements) if tensor.ndim else tensor

        return {name: part(tensor, parameters[name]) for name, tensor in tensors.items()}

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                for name, tensor in tensors.items()}

    def model_tensors(self, objective: Objective) -> dict[str, Tensor]:
        state = objective.state_dict()
        return self.gathered({name: state[name] for name in self.names})

    def averaged_tensors(self, objective: Objective, ema: EMA) -> dict[str, Tensor]:
        with ema.applied(objective):
            tensors = self.model_tensors(objective)
            return tensors | {name: tensor.clone() for name, tensor in tensors.items() if tensor.ndim == 0}

    @contextmanager
    def whole_model(self, objective: Objective) -> Iterator[None]:
        self._gather()
        yield
        self._free()

    def bare(self, objective: Objective, new: Callable[[], Objective]) -> Objective:
        whole = new()
        load_module(whole, self.model_tensors(objective), Path("the sharded model"))
        return whole


def _part(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


LAYOUTS: dict[str, type[Whole]] = {"none": Whole, "fsdp": Sharded}
"""Layouts by `training.shard`."""
