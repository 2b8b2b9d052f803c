"""Checks of a rule before its first step, of a step before its update, and of the metrics of an evaluation."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looped.errors import UserError
from looped.inference.rollout import rollout_of
from looped.nn.checks import kind_of, require
from looped.objectives import Loss, Objective
from looped.objectives.leaks import check_core, in_two_documents
from looped.training.checkpoint import list_checkpoints


def check_rule(trainer: Any) -> None:
    """Raise UserError for the rule of a `Trainer` if it has no rollout, if it trains in one process and there are
    several, and for a custom core that reads what the masks of its first two sequences hide."""
    objective = trainer.objective
    rollout_of(objective)
    if objective.one_process and trainer.accelerator.num_processes > 1:
        raise UserError(f"{objective.one_process}, and there are {trainer.accelerator.num_processes}; start one, or "
                        f"change that setting")

    def run() -> None:
        batch, random = trainer.inputs(0, trainer.rows(0)[:2])
        objective(in_two_documents(objective, batch).to(random.device), random)

    with trainer.accelerator.autocast():
        check_core(objective, run)


def require_loss(loss: Any, objective: Objective) -> None:
    """Raise UserError for what a custom rule cannot be trained by: no `Loss`, or one without gradient."""
    name = type(objective).__name__
    require(loss, Loss, f"the result of {name}.forward", "return looped.objectives.Loss(value)")
    if not isinstance(loss.value, Tensor) or loss.value.ndim:
        raise UserError(f"the loss of {name}.forward is {kind_of(loss.value)}; return the mean over the batch, a "
                        f"tensor of one number")
    if not loss.value.requires_grad:
        raise UserError(f"the loss of {name}.forward carries no gradient; compute it from the model's output without "
                        f"detach() and outside of torch.no_grad()")


def metrics_of(found: Any) -> dict[str, float]:
    """The metrics that `evaluate` returned, as numbers. Raises UserError for anything but numbers by name."""
    require(found, dict, "the result of evaluate", "return numbers by name, as {'nats': 4.2}")
    values = {name: value.item() if isinstance(value, np.generic | Tensor) and not value.ndim else value
              for name, value in found.items()}
    for name, value in values.items():
        if not isinstance(value, int | float):
            raise UserError(f"evaluate returned {kind_of(value)} as {name}; return numbers by name, as {{'nats': 4.2}}")
    return values


def non_finite(trainer: Any, loss: float, norm: float) -> UserError:
    """The error for a step of a `Trainer` that must not be made, with the rows that it comes from."""
    step, data = trainer.done.step, trainer.data.train
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
    bad = trainer.processes.gather(bad_rows(trainer))
    named = [data.describe(step, rows=range(row, row + 1), **trainer.batch_settings())[0] for row in bad[:3]]
    where = "; ".join(named) + (f" and {len(bad) - 3} more rows" if len(bad) > 3 else "")
    trainer.saver.wait()
    good = list_checkpoints(trainer.run_dir)
    return UserError(f"{what} at step {step} ({where or 'no single row'}); nothing was updated or saved, and the last "
                     f"good checkpoint is {good[0] if good else 'not yet there'}; try a lower optim.lr or "
                     f"optim.grad_clip in a new --run")


@torch.no_grad()
def bad_rows(trainer: Any) -> list[int]:
    """Rows of a `Trainer`'s process whose own loss is not finite; randomness is per row, so each can be recomputed
    alone."""
    objective = trainer.objective.eval()
    rows = [row for micro in range(trainer.micro.num) for row in trainer.rows(micro)]
    alone = [trainer.inputs(trainer.done.step, range(row, row + 1)) for row in rows]
    with trainer.layout.whole_model(objective):
        losses = [objective(batch.to(random.device), random).value for batch, random in alone]
    return [row for row, loss in zip(rows, losses, strict=True) if not loss.isfinite()]
