"""Cosines between the gradient through an unrolled loop and its parts, at a checkpoint of a run.

    python scripts/gradient_parts.py RUN --depth 4

`last k`: the gradient of truncation to the last k steps. `weights of step i alone`: dL/dW_i of the core, beside the sum
over all steps. The rules that train by a part are in looped.objectives.gradient_parts.
"""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from looped import load_run
from looped.objectives.bptt import Full, Start
from looped.objectives.gradient_parts import step_with
from looped.rng import StepRandom


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
