"""Measures the trained runs of a comparison on the same held-out sequences, and reads what their training cost.

An evaluation is kept in the run's folder with what it depended on, and is done again only where that has changed.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from looped.compare.plan import Place, Plan
from looped.data.text import TextData, prepare
from looped.evaluation.depth import evaluate_depth, evaluate_samples
from looped.evaluation.judge import Judge
from looped.evaluation.quality import Quality, matched_quality
from looped.training.checkpoint import list_checkpoints, write_text
from looped.training.runs import Run, load_run

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

    def figure(self, metric: str, depth: int, field: str = "mean") -> float | None:
        """A field of one of the rows, None where there is none."""
        return next((row[field] for row in self.rows if (row["metric"], row.get("depth")) == (metric, depth)), None)


class Measurer:
    """Evaluates places; the text is read once, and only where something has to be evaluated."""

    def __init__(self, plan: Plan, finished: list[Place]):
        self.plan, self.finished = plan, finished
        self.text: TextData | None = None

    def __call__(self, place: Place, *, say: Callable[[str], None] = print) -> Measured:
        """What is known of a trained run, evaluated now where that was not done before."""
        inputs, found = self.inputs(place), _read(place.run / FILE)
        if found is None or found["inputs"] != inputs:
            say(f"evaluating {place.name}")
            found = {"inputs": inputs, **self.evaluate(place)}
            (place.run / "eval").mkdir(exist_ok=True)
            write_text(place.run / FILE, json.dumps(found))
        losses = {metric: {int(depth): torch.tensor(values, dtype=torch.float64) for depth, values in by_depth.items()}
                  for metric, by_depth in found["losses"].items()}
        lines = _metrics(place.run)
        return Measured(place, found["rows"], losses, found["samples"], _costs(lines),
                        [line for line in lines if line["kind"] == "heldout"])

    def twin_of(self, place: Place) -> Place | None:
        """The autoregressive run of the same seed, whose samples this one's are held against."""
        return self._autoregressive(place.seed)

    def judge_of(self, place: Place) -> Place | None:
        """That of the next seed, which reads both; None where there is none."""
        seed = (place.seed + 1) % self.plan.num_seeds
        return self._autoregressive(seed) if seed != place.seed else None

    def _autoregressive(self, seed: int) -> Place | None:
        return next((other for other in self.finished if other.arm.config.objective == "ar" and other.seed == seed),
                    None)

    def inputs(self, place: Place) -> dict[str, Any]:
        """All that an evaluation depends on, as JSON holds it."""
        others = [other and [other.run.name, _step(other)] for other in (self.twin_of(place), self.judge_of(place))]
        return {"step": _step(place), "depths": self.depths(place), "config": place.config.model_dump(mode="json"),
                "others": others}

    def depths(self, place: Place) -> list[int]:
        return sorted({*self.plan.depths, place.config.main_depth})

    def evaluate(self, place: Place) -> dict[str, Any]:
        """Rows, losses and samples, as JSON holds them."""
        run = _load(place)
        self.text = self.text or prepare(run.config.data)
        c, seed, decode = run.config.evaluation, run.config.seed, self.text.tokenizer.decode
        sweep = evaluate_depth(run.objective, self.sequences(c.num_sequences), self.depths(place), seed=seed,
                               bytes_per_token=self.text.bytes_per_token, batch_size=c.batch_size)
        prompts = self.sequences(c.num_samples)[:, : c.prompt_length]
        rows, texts = evaluate_samples(run.objective, prompts, place.text_depths, num_tokens=c.sample_length, seed=seed)
        quality = self.quality(place, run, prompts, texts)
        samples = [{"depth": depth, "prompt": decode(prompt), "text": decode(text)} for depth in texts
                   for prompt, text in zip(prompts.tolist(), texts[depth].tolist(), strict=True)]
        losses = {metric: {str(depth): values.tolist() for depth, values in by_depth.items()}
                  for metric, by_depth in (sweep.per_example | quality.per_example).items()}
        return {"rows": [row.as_dict() for row in [*sweep.rows, *rows, *quality.rows]], "losses": losses,
                "samples": samples}

    def sequences(self, num: int) -> Int[Tensor, "num length_and_one"]:
        """Held-out sequences, the same for every arm and seed, and in training; as many as there are."""
        length = self.plan.config.data.length
        return self.text.heldout.sequences(min(num, self.text.heldout.windows(length)), length)

    def quality(self, place: Place, run: Run, prompts: Int[Tensor, "num length"], texts: dict[int, Tensor]) -> Quality:
        """Its samples beside its twin's at equal diversity, where there is a twin and a judge."""
        twin, judge = self.twin_of(place), self.judge_of(place)
        if twin is None or judge is None:
            return Quality()
        reader = _load(judge)
        return matched_quality(run.objective, _load(twin).objective, prompts=prompts, depths=place.text_depths,
                               judge=Judge(judge.name, reader.objective, 1, reader.tokenizer.json()),
                               num_tokens=run.config.evaluation.sample_length, seed=place.seed, twin_name=twin.name,
                               texts=texts)


def _load(place: Place) -> Run:
    """The run, with the evaluation settings of the present command."""
    settings = place.config.evaluation.model_dump(mode="json")
    return load_run(place.run, settings={f"evaluation.{name}": value for name, value in settings.items()})


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
