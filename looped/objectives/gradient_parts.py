"""Ablations of full back-propagation through the loop: the same forward pass without one part of the gradient.

    looped reproduce when_depth_pays --entries one-layer --arms ar,full4,last-weights,last-input

With the weights W_i of step i, all equal, the gradient of full back-propagation is the sum over i of dL/dW_i, each with
the adjoint of all later steps, and through the injected input e it also reaches the embedding. Truncation to the last k
steps drops three things of the steps before them: their dL/dW_i, their dL/de, and the adjoint of their states. The
rules here drop one of them at a time, at the whole adjoint. They are named in `objective` by their dotted paths. They
save little computation: every step is still run forward, and its states backward.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from looped.config.rules import Rule
from looped.data.batch import Batch
from looped.objectives.base import Loss
from looped.objectives.bptt import Full, Start
from looped.rng import StepRandom
from looped.tensor_types import Float, Int

READS = ("recurrence.mean", "recurrence.from_share", "recurrence.stages", "model.state_init", "model.state_std")


class PartOfSteps(Full):
    """`full` without a part of its gradient; subclasses cut it in the steps that are not `kept`."""

    rule: ClassVar[Rule]

    def loss_after(self, start: Start, no_grad: int, grad: int) -> Float[Tensor, ""]:
        state = self.model.initial_state(start.e, start.noise)
        kept = self.steps_kept(grad)
        for index in range(grad):
            state = self.step(state, start, grad, keep=index in kept)
        return self.read_out(state, start.batch, start.rows).mean()

    def steps_kept(self, num_steps: int) -> set[int]:
        """The steps whose part of the gradient is kept."""
        return {num_steps - 1}

    def step(self, state: Tensor, start: Start, num_steps: int, *, keep: bool) -> Tensor:
        raise NotImplementedError


class LastWeights(PartOfSteps):
    """The core's weights learn from the last step alone, the encoded input from all steps."""

    rule = Rule("last-weights", loops=True, reads=READS)

    def step(self, state: Tensor, start: Start, num_steps: int, *, keep: bool) -> Tensor:
        return step_with(self.model, state, start, {} if keep else detached(self.model.recurrence.core))


class RandomWeights(PartOfSteps):
    """The core's weights learn from one random step, whose gradient is multiplied by the number of steps and so is that
    of all steps on average; the encoded input learns from all steps."""

    rule = Rule("random-weights", loops=True, reads=READS)

    def forward(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Loss:
        self.uniform = float(torch.rand((), generator=random.lockstep("step with weights")))
        return super().forward(tokens, random)

    def steps_kept(self, num_steps: int) -> set[int]:
        return {int(self.uniform * num_steps)}

    def step(self, state: Tensor, start: Start, num_steps: int, *, keep: bool) -> Tensor:
        core = self.model.recurrence.core
        return step_with(self.model, state, start, times(core, num_steps) if keep else detached(core))


class LastInput(PartOfSteps):
    """The encoded input learns from the last step alone, the core's weights from all steps."""

    rule = Rule("last-input", loops=True, reads=READS)

    def step(self, state: Tensor, start: Start, num_steps: int, *, keep: bool) -> Tensor:
        return self.model.step(state, start.e if keep else start.e.detach(), None, start.rows)


def detached(core: nn.Module) -> dict[str, Tensor]:
    """The weights of a core, by name, without gradient."""
    return {name: weight.detach() for name, weight in core.named_parameters()}


def times(core: nn.Module, factor: float) -> dict[str, Tensor]:
    """The weights of a core, by name, with `factor` times their gradient."""
    return {name: factor * weight - ((factor - 1) * weight).detach() for name, weight in core.named_parameters()}


def step_with(model: nn.Module, state: Tensor, start: Start, weights: Mapping[str, Tensor]) -> Tensor:
    """A loop step of the model with other tensors as the weights of its core, by their names there."""
    ours = {f"model.recurrence.core.{name}": weight for name, weight in weights.items()}
    return functional_call(_Step(model), ours, (state, start))


class _Step(nn.Module):
    """One loop step as a module, which `functional_call` can call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, state: Tensor, start: Start) -> Tensor:
        return self.model.step(state, start.e, None, start.rows)
