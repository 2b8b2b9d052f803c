"""Measures the trained runs of a comparison on the same held-out sequences, and reads what their training cost.

An evaluation is kept in the run's folder with what it depended on, and is done again only where that has changed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from looped.compare.plan import Place, Plan
from looped.data.text import TextData, prepare
from looped.evaluation.depth import evaluate_run
from looped.evaluation.judge import Judge
from looped.training.checkpoint import list_checkpoints, write_text
from looped.training.runs import load_run

FILE = "eval/compare.json"
COSTS = ("step", "tokens", "layer_forwards", "seconds", "peak_bytes")


@dataclass(frozen=True)
class Measured:
    """One run: `rows` and `samples` as in an `Evaluation`, `losses[metric][depth]` a figure a held-out sequence,
    `costs` of its training, `curve`: the held-out lines of its metrics, oldest first."""

    place: Place
    rows: list[dict[str, Any]]
    losses: dict[str, dict[int, Float[Tensor, "num"]]]
    samples: list[dict[str, Any]]
    costs: dict[str, float]
    curve: list[dict[str, Any]]

    @property
    def main(self) -> Float[Tensor, "num"]:
        """Nats a token as a next-token predictor: at sigma_max for a denoiser, a loop at its mean trained depth."""
        if "nats_at_sigma_max" in self.losses:
            return self.losses["nats_at_sigma_max"][1]
        return self.losses["nats_per_token"][self.place.config.main_depth]

    def mean(self, metric: str, depth: int | None = None) -> float | None:
        """The mean of one of the rows, None where there is none."""
        return next((row["mean"] for row in self.rows if (row["metric"], row.get("depth")) == (metric, depth)), None)


class Measurer:
    """Evaluates places; the text is read once, and only where something has to be evaluated."""

    def __init__(self, plan: Plan, finished: list[Place]):
        self.plan, self.finished = plan, finished
        self.text: TextData | None = None

    def __call__(self, place: Place, *, say=print) -> Measured:
        """What is known of a trained run, evaluated now where that was not done before."""
        judge, inputs = self.judge_of(place), self.inputs(place)
        found = _read(place.run / FILE)
        if found is None or found["inputs"] != inputs:
            say(f"evaluating {place.name}")
            found = {"inputs": inputs, **self.evaluate(place, judge)}
            (place.run / "eval").mkdir(exist_ok=True)
            write_text(place.run / FILE, json.dumps(found))
        losses = {metric: {int(depth): torch.tensor(values, dtype=torch.float64) for depth, values in by_depth.items()}
                  for metric, by_depth in found["losses"].items()}
        lines = _metrics(place.run)
        return Measured(place, found["rows"], losses, found["samples"], _costs(lines),
                        [line for line in lines if line["kind"] == "heldout"])

    def judge_of(self, place: Place) -> Place | None:
        """The autoregressive run of the next seed, which reads this one's samples; None where there is none."""
        seed = (place.seed + 1) % self.plan.num_seeds
        return next((other for other in self.finished if other.arm.config.objective == "ar" and other.seed == seed
                     and seed != place.seed), None)

    def inputs(self, place: Place) -> dict[str, Any]:
        """All that an evaluation depends on, as JSON holds it."""
        judge = self.judge_of(place)
        return {"step": _step(place), "depths": self.depths(place), "config": place.config.model_dump(mode="json"),
                "judge": judge and [judge.run.name, _step(judge)]}

    def depths(self, place: Place) -> list[int]:
        return sorted({*self.plan.depths, place.config.main_depth, place.text_depth})

    def evaluate(self, place: Place, judge: Place | None) -> dict[str, Any]:
        """Rows, losses and samples, as JSON holds them."""
        settings = {f"evaluation.{name}": value
                    for name, value in place.config.evaluation.model_dump(mode="json").items()}
        run = load_run(place.run, settings=settings)
        self.text = self.text or prepare(run.config.data)
        result = evaluate_run(run.objective, self.text, run.config, self.depths(place), judge=judge and _judge(judge))
        losses = {metric: {str(depth): values.tolist() for depth, values in by_depth.items()}
                  for metric, by_depth in result.per_example.items()}
        return {"rows": [row.as_dict() for row in result.rows], "losses": losses, "samples": result.samples}


def _judge(place: Place) -> Judge:
    run = load_run(place.run)
    return Judge(place.name, run.objective, run.config.main_depth, run.tokenizer.json())


def _step(place: Place) -> int:
    return int(list_checkpoints(place.run)[0].name.removeprefix("step-"))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if {"inputs", "rows", "losses", "samples"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _costs(lines: list[Mapping[str, Any]]) -> dict[str, float]:
    """What training took in all; the peak is the highest of the processes that had a part in it."""
    trained = [line for line in lines if line["kind"] == "train"]
    return {name: trained[-1][name] for name in COSTS[:-1]} | {"peak_bytes": max(t["peak_bytes"] for t in trained)}
