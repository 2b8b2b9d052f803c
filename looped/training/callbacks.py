"""Training callbacks: called after steps, log lines and evaluations, and able to end training.

    train(config, "runs/mine", callbacks=[EarlyStopping("next_token", patience=3), Trackers(tracker)])
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from looped.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from looped.training.trainer import Trainer


class Callback:
    """Base class whose hooks do nothing; override some. `trainer.stop()` in any of them ends training after the current
    step, which is saved. With several processes, `on_step` is called on each, the other hooks on the first only."""

    def on_step(self, trainer: "Trainer") -> None:
        """After each optimiser step; `trainer.done` has the counters, `trainer.figures` the step's loss and gradient
        norm."""

    def on_log(self, trainer: "Trainer", values: Mapping[str, float]) -> None:
        """After each log line, with its means: `loss`, `grad_norm`, `lr`, tokens_per_second and the like."""

    def on_evaluation(self, trainer: "Trainer", values: Mapping[str, float]) -> None:
        """After each evaluation, with its metrics."""


class EarlyStopping(Callback):
    """Ends training when a metric has not improved by more than `least` for `patience` evaluations.

    metric: its name, as `next_token`. larger: True if larger is better. Raises UserError at an evaluation without it.
    """

    def __init__(self, metric: str, patience: int = 3, *, least: float = 0.0, larger: bool = False):
        self.metric, self.patience, self.least, self.larger = metric, patience, least, larger
        self.best, self.since = -math.inf, 0

    def on_evaluation(self, trainer: "Trainer", values: Mapping[str, float]) -> None:
        if self.metric not in values:
            raise UserError(f"no evaluation of this run has '{self.metric}'{did_you_mean(self.metric, values)}")
        figure = values[self.metric] * (1 if self.larger else -1)
        better = figure > self.best + self.least
        self.best, self.since = (figure, 0) if better else (self.best, self.since + 1)
        if self.since >= self.patience:
            trainer.monitor.say(f"{self.metric} has not improved for {self.since} evaluations; training ends")
            trainer.stop()


class Trackers(Callback):
    """Logs every line of metrics.jsonl to trackers of accelerate (`accelerate.tracking`), as `train/loss`.

    A tracker that has not been started is started at the first line. `finish()` is left to the caller, since several
    runs may share a tracker.
    """

    def __init__(self, *trackers: Any):
        self.trackers = trackers

    def on_log(self, trainer: "Trainer", values: Mapping[str, float]) -> None:
        self._log("train", trainer, values)

    def on_evaluation(self, trainer: "Trainer", values: Mapping[str, float]) -> None:
        self._log("heldout", trainer, values)

    def _log(self, kind: str, trainer: "Trainer", values: Mapping[str, float]) -> None:
        for tracker in self.trackers:
            if not hasattr(tracker, "tracker") and hasattr(tracker, "start"):  # set by `start`, not by the constructor
                tracker.start()
            tracker.log({f"{kind}/{name}": value for name, value in values.items()}, step=trainer.done.step)
