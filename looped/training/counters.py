"""Counters of the steps, tokens and seconds spent in training, saved with every checkpoint."""

from dataclasses import dataclass, fields
from typing import Any

from looped.config.training import TrainingConfig


@dataclass
class Counters:
    """Training spent so far. `seconds`: of training only, over all resumes, by `training.clock`."""

    step: int = 0
    tokens: int = 0
    layer_forwards: float = 0.0
    seconds: float = 0.0

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Counters":
        """The counters in the state of a checkpoint."""
        return cls(**{field.name: state[field.name] for field in fields(cls)})

    def spent(self, unit: str) -> float:
        return {"steps": self.step, "tokens": self.tokens, "layer-forwards": self.layer_forwards,
                "seconds": self.seconds}[unit]

    def fraction(self, training: TrainingConfig) -> float:
        """The fraction of the budget that is spent."""
        return self.spent(training.budget_unit) / training.budget

    def due(self, training: TrainingConfig) -> int:
        """The number of the `training.num_evals` evaluations whose part of the budget is spent: by whole numbers, since
        29 / 50 * 50 is less than 29."""
        return int(self.spent(training.budget_unit) * training.num_evals // training.budget)
