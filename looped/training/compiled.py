"""Targets of `training.compile`: the loop step, which serves any depth, or the whole rule and the update as graphs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.optim import Optimizer

from looped.config import Config
from looped.devices import widest
from looped.errors import UserError
from looped.objectives import Objective

INSTEAD = "set training.compile to step"
MOST_BLOCKS = 64
"""Graphs that an update may have, one for each block that trains alone."""


def compile_whole(objective: Objective, **settings: Any) -> None:
    """Compile the forward pass of a rule, and with it the backward pass, in place. The graph takes a step's draws as
    inputs (`StepDraws`); shapes are fixed, and each outcome of a rule's decisions, such as its block, has a graph.
    settings: of `torch.compile`. Raises UserError for a rule whose steps are not alike (`Objective.changes`)."""
    if objective.changes:
        raise UserError(f"training.compile objective needs steps that are alike, but {objective.changes}; {INSTEAD}")
    num_graphs = max(8, 2 * len(objective.decisions()) * getattr(objective.model.recurrence, "num_blocks", 1))
    objective.compile(**{"fullgraph": True, "dynamic": False, "recompile_limit": num_graphs,
                         "isolate_recompiles": True} | settings)


def compile_update(optimizers: Iterable[Optimizer], **settings: Any) -> None:
    """Compile the update of each optimiser that is not one fused kernel already, in place: Muon's, of some twenty
    operations per matrix. Weights without gradient are left out of an update, so each block of a core has a graph."""
    for optimizer in optimizers:
        if not optimizer.defaults.get("fused"):
            optimizer.step = CompiledUpdate(optimizer, **settings)  # ty: ignore[invalid-assignment]


class CompiledUpdate:
    """The update of an optimiser as one graph for every learning rate: it reads the rates from tensors, as which they
    are no constants of the graph."""

    def __init__(self, optimizer: Optimizer, **settings: Any):
        self.groups = optimizer.param_groups
        devices = [group["params"][0].device for group in self.groups]
        self.rates: list[Tensor] = [torch.zeros((), dtype=widest(device), device=device) for device in devices]
        fixed = {"fullgraph": True, "dynamic": False, "recompile_limit": MOST_BLOCKS, "isolate_recompiles": True}
        self.step = torch.compile(optimizer.step, **fixed | settings)

    def __call__(self) -> None:
        numbers = [group["lr"] for group in self.groups]
        for group, rate, number in zip(self.groups, self.rates, numbers, strict=True):
            group["lr"] = rate.fill_(number)
        try:
            self.step()
        finally:
            for group, number in zip(self.groups, numbers, strict=True):
                group["lr"] = number


def _any_run(config: Config, device: torch.device, num_processes: int) -> str:
    return ""


def _graphs_refuse(config: Config, device: torch.device, num_processes: int) -> str:
    """The reason why a run cannot replay CUDA graphs. A graph writes its gradients where the last replay has."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if config.training.accumulation > 1 or num_processes > 1:
        return "cannot add the gradients of several micro-batches or processes"
    return ""


@dataclass(frozen=True)
class Compilation:
    """A target of `training.compile`. rule, update: compile a rule and its optimisers in place. whole: the rule is one
    graph, which needs its draws beforehand. refuses: why a run cannot have it, or an empty string."""

    rule: Callable[[Objective], None] = lambda objective: None
    update: Callable[[list[Optimizer]], None] = lambda optimizers: None
    whole: bool = False
    refuses: Callable[[Config, torch.device, int], str] = _any_run

    def check(self, config: Config, device: torch.device, num_processes: int) -> None:
        """Raise UserError if the run cannot have it."""
        if reason := self.refuses(config, device, num_processes):
            raise UserError(f"training.compile {config.training.compile} {reason}; set training.compile to "
                            f"objective")


COMPILE: dict[bool | str, Compilation] = {
    False: Compilation(),
    "step": Compilation(lambda objective: objective.model.compile_step()),
    "objective": Compilation(compile_whole, compile_update, whole=True),
    "cuda-graphs": Compilation(partial(compile_whole, mode="reduce-overhead"), compile_update, whole=True,
                               refuses=_graphs_refuse),
}


@contextmanager
def one_graph(rule: str) -> Iterator[None]:
    """Context in which a rule that is no single graph raises a UserError with the first reason."""
    try:
        yield
    except TorchDynamoException as error:
        raise UserError(f"objective {rule} cannot be compiled as one graph ({str(error).splitlines()[0]}); {INSTEAD}"
                        ) from error
