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
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Muon, Optimizer

from looped.config import Config
from looped.errors import UserError
from looped.objectives import Objective
from looped.training.checkpoint import (
    Tensors,
    load_module,
    load_tensors,
    module_tensors,
    optimizer_tensors,
    part_of,
    reading,
)
from looped.training.optim import EMA, Named
from looped.training.processes import Processes
from looped.training.saving import Saver, ShardSaver
from looped.training.shards import read_shards, saved_tensors

CARRIED = "carried"
"""The part of a checkpoint with what the rule carries from step to step (`Objective.to_carry`)."""


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

    def model_tensors(self, objective: Objective) -> dict[str, Tensor]:
        """State of the model as it is laid out, each storage once."""
        return module_tensors(objective)

    def averages(self, objective: Objective, ema: EMA) -> dict[str, Tensor]:
        """Averages by the names of their parameters, laid out as these are."""
        return dict(zip(ema.names, ema.averages, strict=True))

    def tensors(self, objective: Objective, optimizers: list[Optimizer], ema: EMA | None) -> dict[str, Tensors]:
        """The tensors of a checkpoint, by part, as they are laid out."""
        model = self.model_tensors(objective)
        parts = {"model": model, "optimizer": optimizer_tensors(optimizers)}
        parts |= {} if ema is None else {"ema": model | self.averages(objective, ema)}
        carried = objective.to_carry()
        return parts | {CARRIED: carried} if carried else parts

    def read(self, checkpoint: Path, part: str, objective: Objective) -> Tensors:
        """The tensors of one part of a checkpoint, laid out as their parameters are. Raises UserError if it cannot be
        read."""
        return load_tensors(checkpoint, part)

    def carry_on(self, checkpoint: Path, objective: Objective) -> None:
        """Give the rule what it carried when a checkpoint was written. Raises UserError if that cannot be read."""
        if part_of(checkpoint, CARRIED).exists():
            objective.carry_on(self.read(checkpoint, CARRIED, objective))

    def saver(self, run_dir: Path, keep: int, processes: Processes, *, background: bool) -> Saver:
        """A writer of checkpoints of this layout, made by all processes together."""
        return Saver(run_dir, keep, processes, background=background)

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

    def model_tensors(self, objective: Objective) -> dict[str, Tensor]:
        state = objective.state_dict()
        return {name: state[name] for name in self.names}

    def averages(self, objective: Objective, ema: EMA) -> dict[str, Tensor]:
        averages = zip(ema.averages, objective.parameters(), strict=True)
        return {name: _laid_out(average, like) for name, (average, like) in zip(ema.names, averages, strict=True)}

    def read(self, checkpoint: Path, part: str, objective: Objective) -> Tensors:
        source, owners = part_of(checkpoint, part), dict(objective.named_parameters())
        if not source.is_dir():
            return self._read_whole(source, owners)
        tensors = {name: _empty(tensor, _owner(name, owners)) for name, tensor in saved_tensors(source).items()}
        read_shards(source, tensors, alone=False)
        return tensors

    @staticmethod
    def _read_whole(file: Path, owners: Mapping[str, nn.Parameter]) -> Tensors:
        """The tensors of a file, of which never more than one is whole in memory."""
        with reading(file), safe_open(file, framework="pt") as found:
            return {name: _shard(found.get_tensor(name), _owner(name, owners)) for name in found.keys()}  # noqa: SIM118

    def saver(self, run_dir: Path, keep: int, processes: Processes, *, background: bool) -> Saver:
        return ShardSaver(run_dir, keep, processes, background=background)

    @contextmanager
    def whole_model(self, objective: Objective) -> Iterator[None]:
        self._gather()
        yield
        self._free()

    def bare(self, objective: Objective, new: Callable[[], Objective]) -> Objective:
        whole = new()
        tensors = {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                   for name, tensor in self.model_tensors(objective).items()}
        load_module(whole, tensors, Path("the sharded model"))
        return whole


def _owner(name: str, parameters: Mapping[str, nn.Parameter]) -> Any:
    """The parameter of this name, or the one that a slot of an optimiser (`<parameter>.<slot>`) belongs to."""
    return parameters.get(name, parameters.get(name.rpartition(".")[0]))


def _sharded_as(tensor: Tensor, owner: Any) -> bool:
    """True if a tensor is cut as its owner is: other shapes, such as those of another model, stay whole."""
    return hasattr(owner, "placements") and tensor.shape == owner.shape


def _empty(tensor: Tensor, owner: Any) -> Tensor:
    """A tensor to read into, of the shape and dtype of a saved one."""
    like = owner.detach() if _sharded_as(tensor, owner) else tensor
    return torch.empty_like(like, dtype=tensor.dtype, device=like.device if like is not tensor else "cpu")


def _shard(tensor: Tensor, owner: Any) -> Tensor:
    """This process's part of a tensor that all have read."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, owner.device_mesh, owner.placements, src_data_rank=None) \
        if _sharded_as(tensor, owner) else tensor


def _laid_out(part: Tensor, owner: Any) -> Tensor:
    """The tensor of which this process has a part, cut as its owner is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, owner.device_mesh, owner.placements, run_check=False, shape=owner.shape,
                              stride=owner.stride()) if hasattr(owner, "placements") else part


def _part(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


LAYOUTS: dict[str, type[Whole]] = {"none": Whole, "fsdp": Sharded}
"""Layouts by `training.shard`."""
