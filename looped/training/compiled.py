"""Targets of `training.compile`: the loop step, which serves any depth, or the whole rule as one graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch._dynamo.exc import TorchDynamoException

from looped.errors import UserError
from looped.objectives import Objective

INSTEAD = "set training.compile to step"


def compile_whole(objective: Objective, **settings: Any) -> None:
    """Compile the forward pass of a rule, and with it the backward pass, in place. The graph takes a step's draws as
    inputs (`StepDraws`); shapes are fixed, and each outcome of a rule's decisions, such as its block, has a graph.
    settings: of `torch.compile`. Raises UserError for a rule whose steps are not alike (`Objective.changes`)."""
    if objective.changes:
        raise UserError(f"training.compile objective needs steps that are alike, but {objective.changes}; {INSTEAD}")
    num_graphs = max(8, 2 * len(objective.decisions()) * getattr(objective.model.recurrence, "num_blocks", 1))
    objective.compile(**{"fullgraph": True, "dynamic": False, "recompile_limit": num_graphs,
                         "isolate_recompiles": True} | settings)


COMPILE: dict[bool | str, Callable[[Objective], None]] = {
    False: lambda objective: None,
    "step": lambda objective: objective.model.compile_step(),
    "objective": compile_whole,
}


@contextmanager
def one_graph(rule: str) -> Iterator[None]:
    """Context in which a rule that is no single graph raises a UserError with the first reason."""
    try:
        yield
    except TorchDynamoException as error:
        raise UserError(f"objective {rule} cannot be compiled as one graph ({str(error).splitlines()[0]}); {INSTEAD}"
                        ) from error
