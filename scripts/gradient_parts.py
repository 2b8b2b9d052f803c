"""Parts of the gradient through an unrolled loop: how well a part agrees with the whole, and what training by it gives.

    python scripts/gradient_parts.py RUN --depth 4               cosines at a checkpoint of a run
    PYTHONPATH=scripts looped compare stdlib-one-layer --objectives \\
        "full,last=gradient_parts.LastWeights,random=gradient_parts.RandomWeights,input=gradient_parts.LastInput"

With the weights W_i of step i, all equal, the gradient of full back-propagation is the sum over i of dL/dW_i, each with
the adjoint of all later steps, and through the injected input e it also reaches the embedding. Truncation to the last k
steps drops three things of the steps before them: their dL/dW_i, their dL/de, and the adjoint of their states.
The three rules here drop one of them at a time, at the whole adjoint:

    LastWeights     dL/dW of the last step alone; dL/de of all steps
    RandomWeights   dL/dW of one random step, times the number of steps (without bias); dL/de of all steps
    LastInput       dL/dW of all steps; dL/de of the last step alone
"""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity

from looped import load_run
from looped.config.rules import Rule
from looped.objectives.bptt import Full, Start
from looped.rng import StepRandom

READS = ("recurrence.mean", "recurrence.from_share", "recurrence.stages", "recurrence.loss_on", "recurrence.damping",
         "model.state_init", "model.state_std")


class PartOfSteps(Full):
    """`full` without a part of its gradient; subclasses cut it in the steps that are not `kept`."""

    rule: ClassVar[Rule]

    def loss_after(self, start: Start, no_grad: int, grad: int) -> Tensor:
        state = self.model.initial_state(start.e, start.noise)
        kept = self.steps_kept(grad)
        for index in range(grad):
            state = self.step(state, start, index in kept)
        return self.read_out(state, start.batch, start.rows).mean()

    def steps_kept(self, num_steps: int) -> set[int]:
        """The steps whose part of the gradient is kept."""
        return {num_steps - 1}

    def step(self, state: Tensor, start: Start, keep: bool) -> Tensor:
        raise NotImplementedError


class LastWeights(PartOfSteps):
    """Weights of the core learn from the last step alone."""

    rule = Rule("last-weights", loops=True, reads=READS)

    def step(self, state: Tensor, start: Start, keep: bool) -> Tensor:
        return step_with(self.model, state, start, {} if keep else detached(self.model.recurrence.core))


class RandomWeights(PartOfSteps):
    """Weights of the core learn from one random step, whose gradient is multiplied by the number of steps."""

    rule = Rule("random-weights", loops=True, reads=READS)

    def forward(self, tokens: Any, random: StepRandom) -> Any:
        self.uniform = float(torch.rand((), generator=random.lockstep("step with weights")))
        return super().forward(tokens, random)

    def steps_kept(self, num_steps: int) -> set[int]:
        return {int(self.uniform * num_steps)}

    def step(self, state: Tensor, start: Start, keep: bool) -> Tensor:
        own = times(self.model.recurrence.core, self.config.mean) if keep else detached(self.model.recurrence.core)
        return step_with(self.model, state, start, own)


class LastInput(PartOfSteps):
    """The encoded input learns from the last step alone."""

    rule = Rule("last-input", loops=True, reads=READS)

    def step(self, state: Tensor, start: Start, keep: bool) -> Tensor:
        return self.model.step(state, start.e if keep else start.e.detach(), None, start.rows)


def detached(core: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in core.named_parameters()}


def times(core: nn.Module, factor: float) -> dict[str, Tensor]:
    """The same weights with `factor` times their gradient."""
    return {name: factor * weight - ((factor - 1) * weight).detach() for name, weight in core.named_parameters()}


def step_with(model: nn.Module, state: Tensor, start: Start, weights: Mapping[str, Tensor]) -> Tensor:
    """A loop step by a core with other tensors as its weights."""
    rows = model.placed(state, start.rows).at("core")
    return functional_call(model.recurrence.core, dict(weights), (state, start.e, None, rows))


# ---- cosines -----------------------------------------------------------------------------------------------------


def groups(objective: nn.Module) -> dict[str, list[str]]:
    names = [name for name, _ in objective.named_parameters()]
    core = [name for name in names if ".recurrence." in name]
    return {"all": names, "core": core, "embedding": [name for name in names if ".embed." in name]}


def flat(gradients: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in names])


def gradient(objective: nn.Module, value: Tensor) -> dict[str, Tensor]:
    named = dict(objective.named_parameters())
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(weight) if grad is None else grad
            for (name, weight), grad in zip(named.items(), found, strict=True)}


def by_step(objective: Full, start: Start, depth: int) -> list[Tensor]:
    """dL/dW_i of the core for each step i, flat."""
    model = objective.model
    core = model.recurrence.core
    copies = [{name: weight.detach().clone().requires_grad_() for name, weight in core.named_parameters()}
              for _ in range(depth)]
    state = model.initial_state(start.e, start.noise)
    for weights in copies:
        state = step_with(model, state, start, weights)
    value = objective.read_out(state, start.batch, start.rows).mean()
    flat_weights = [weight for weights in copies for weight in weights.values()]
    found = torch.autograd.grad(value, flat_weights)
    num = len(copies[0])
    return [torch.cat([grad.flatten() for grad in found[place * num:(place + 1) * num]]) for place in range(depth)]


def compare(run_path: Path, depth: int, num: int, step: int | None) -> dict[str, Tensor]:
    """Name of a figure -> (num batches,) tensor."""
    run = load_run(run_path, ema=False, step=step)
    objective = Full(run.objective.model, run.config.replace(**{"recurrence.mean": depth}).recurrence).double()
    rows: dict[str, list[float]] = {}
    for batch in range(num):
        tokens = run.data.train.batch(100_000 + batch, batch_size=run.config.training.batch_size, seed=run.config.seed,
                                       length=run.config.data.length)
        start = objective.start(tokens, StepRandom(1, batch, count=len(tokens)))
        whole = gradient(objective, objective.loss_after(start, 0, depth))
        for k in range(1, depth + 1):
            start = objective.start(tokens, StepRandom(1, batch, count=len(tokens)))
            part = gradient(objective, objective.loss_after(start, depth - k, k))
            for group, names in groups(objective).items():
                one, other = flat(part, names), flat(whole, names)
                rows.setdefault(f"last {k}: cosine, {group}", []).append(float(cosine_similarity(one, other, dim=0)))
                rows.setdefault(f"last {k}: norm, {group}", []).append(float(one.norm() / other.norm()))
        start = objective.start(tokens, StepRandom(1, batch, count=len(tokens)))
        steps = by_step(objective, start, depth)
        total = torch.stack(steps).sum(0)
        difference = float((total - flat(whole, groups(objective)["core"])).norm() / total.norm())
        assert difference < 1e-6, f"the steps' gradients add up to the whole only within {difference:.1e}"
        for place, part in enumerate(steps, start=1):
            rows.setdefault(f"weights of step {place} alone: cosine, core", []).append(
                float(cosine_similarity(part, total, dim=0)))
            rows.setdefault(f"weights of step {place} alone: norm, core", []).append(float(part.norm() / total.norm()))
    return {name: torch.tensor(values) for name, values in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--depth", type=int, default=4, help="loop steps")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--step", type=int, help="checkpoint; by default the newest")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name, values in compare(asked.run, asked.depth, asked.batches, asked.step).items():
        print(f"{name:45s} {values.mean():6.3f}  ({values.min():.3f} to {values.max():.3f})")


if __name__ == "__main__":
    main()
