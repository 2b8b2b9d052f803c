"""Measures the trained runs of a comparison on the same held-out data, and reads their training costs.

An evaluation is stored in the run's folder together with its inputs, and is repeated only if those have changed.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from looped.compare.curve import Metric
from looped.compare.plan import Plan, RunSpec
from looped.devices import CPU, Placement
from looped.evaluation.intervals import Clusters
from looped.tensor_types import Float
from looped.training.checkpoint import list_checkpoints, write_text
from looped.training.logs import costs_of, read_metrics
from looped.training.runs import Run, load_run

FILE = "eval/compare.json"
Common = tuple[RunSpec, list[dict[str, Any]], dict[str, float], list[dict[str, Any]]]
"""The fields of every `Measured`: place, rows, costs, curve."""


@dataclass(frozen=True)
class Measured:
    """One measured run: `rows` of its evaluation, `costs` of its training, `curve` (the held-out lines of
    metrics.jsonl, oldest first). `gauge`: the metric of the curve; `depth_gauge`: the metric of the plots over depth.
    """

    gauge: ClassVar[Metric]
    depth_gauge: ClassVar[Any] = property(lambda self: self.gauge)
    place: RunSpec
    rows: list[dict[str, Any]]
    costs: dict[str, float]
    curve: list[dict[str, Any]]

    @property
    def followed(self) -> Float[Tensor, "num"]:
        """The gauge after training, before averaging: one value per held-out sequence, problem or image."""
        raise NotImplementedError

    @property
    def clusters(self) -> Clusters | None:
        """The cluster of each value of `followed`; None if they are independent."""
        return None

    @property
    def units(self) -> str:
        """The plural noun for the items that intervals are over."""
        return self.gauge.examples

    @property
    def examples(self) -> str:
        """The held-out items, for sentences: `64 held-out problems`."""
        return f"{len(self.followed)} held-out {self.gauge.examples}"


class MeanMeasured(Measured):
    """One measured run that also has one figure per depth, over all held-out data."""

    @property
    def by_depth(self) -> dict[int, float]:
        raise NotImplementedError


class Measurer(ABC):
    """Evaluates trained runs; subclasses choose the data. `keys`: the fields of a stored evaluation besides `inputs`
    and `rows`."""

    keys: ClassVar[frozenset[str]]

    def __init__(self, plan: Plan, finished: list[RunSpec], placement: Placement = CPU):
        self.plan = plan
        self.finished = finished
        self.placement = placement

    def __call__(self, place: RunSpec, *, say: Callable[[str], None] = print) -> Measured:
        """The measured run; evaluates it now if no stored evaluation is valid."""
        inputs, found = self.inputs(place), self.read(place.run / FILE)
        if found is None or found["inputs"] != inputs:
            say(f"evaluating {place.name}")
            with self.placement.at_work(place.config.training.threads):
                found = {"inputs": inputs, **self.evaluate(place)}
            found["rows"] = [{**row, **self.placement.fields} for row in found["rows"]]
            (place.run / "eval").mkdir(exist_ok=True)
            write_text(place.run / FILE, json.dumps(found))
        lines = read_metrics(place.run)
        return self.made(found, (place, found["rows"], costs_of(lines),
                                 [line for line in lines if line["kind"] == "heldout"]))

    def inputs(self, place: RunSpec) -> dict[str, Any]:
        """The inputs of an evaluation, as JSON values; the device is left out since it changes only rounding."""
        rounded = {} if self.placement.dtype == "fp32" else {"dtype": self.placement.dtype}
        return {"step": step_of(place), "depths": self.depths(place), "config": place.config.model_dump(mode="json"),
                **rounded}

    def depths(self, place: RunSpec) -> list[int]:
        return sorted({*self.plan.depths, place.config.main_depth})

    @abstractmethod
    def evaluate(self, place: RunSpec) -> dict[str, Any]:
        """The rows and all of `keys`, as JSON values."""

    @abstractmethod
    def made(self, found: Mapping[str, Any], common: Common) -> Measured:
        """The measured run, built from the result of `evaluate`."""

    def load(self, place: RunSpec) -> Run:
        """The run, with the evaluation settings of the current command."""
        settings = place.config.evaluation.model_dump(mode="json")
        return load_run(place.run, settings={f"evaluation.{name}": value for name, value in settings.items()},
                        device=self.placement.device)

    def read(self, path: Path) -> dict[str, Any] | None:
        """A stored evaluation; None if there is none, or it is unreadable or incomplete."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return found if {"inputs", "rows", *self.keys} <= found.keys() else None
        except (OSError, ValueError, AttributeError):
            return None


def step_of(place: RunSpec) -> int:
    """The step of the newest checkpoint."""
    return int(list_checkpoints(place.run)[0].name.removeprefix("step-"))
